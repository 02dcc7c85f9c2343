"""The real clients of langchain-community, openai and httpx, over a real socket, with models that compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from helpers_serve import listening, real_service, scripted, service_of, tiny_model, tokenizer_of

pytest.importorskip("langchain_community", reason="langchain-community is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def glm3() -> Iterator[str]:
    with listening(real_service("chatglm3-6b")) as address:
        yield address


@pytest.fixture(params=["chatglm-6b", "chatglm2-6b"], scope="module")
def older(request: pytest.FixtureRequest) -> Iterator[str]:
    with listening(real_service(request.param)) as address:
        yield address


# LangChain


def test_langchain_chatglm3(glm3: str) -> None:
    """As on LangChain's page: a limit of 80000 tokens, messages in front, the older chain and the newer pipe."""
    from langchain_classic.chains import LLMChain
    from langchain_community.llms.chatglm3 import ChatGLM3
    from langchain_core.messages import AIMessage
    from langchain_core.prompts import PromptTemplate

    messages = [AIMessage(content="我将从美国到中国来旅游。"), AIMessage(content="欢迎问我任何问题。")]
    llm = ChatGLM3(
        endpoint_url=f"{glm3}/v1/chat/completions", max_tokens=80000, prefix_messages=messages, top_p=0.9
    )
    prompt = PromptTemplate.from_template("{question}")
    assert isinstance(LLMChain(prompt=prompt, llm=llm).run("北京和上海两座城市有什么不同？"), str)
    assert isinstance((prompt | llm).invoke({"question": "hello"}), str)
    assert isinstance(llm.invoke("hello", stop=["x"]), str)


@pytest.mark.parametrize("with_history", [False, True])
def test_langchain_chatglm(older: str, with_history: bool) -> None:
    from langchain_classic.chains import LLMChain
    from langchain_community.llms import ChatGLM
    from langchain_core.prompts import PromptTemplate

    llm = ChatGLM(
        endpoint_url=older, max_token=80000, top_p=0.9, history=[["我将去中国旅游", "欢迎问我任何问题。"]],
        model_kwargs={"sample_model_args": False}, with_history=with_history,
    )  # fmt: skip
    prompt = PromptTemplate.from_template("{question}")
    answer = LLMChain(prompt=prompt, llm=llm).run("hello")
    assert isinstance(answer, str)
    assert isinstance((prompt | llm).invoke({"question": "hello"}), str)
    assert len(llm.history) == (3 if with_history else 1)
    if with_history:
        assert llm.history[1] == ["hello", answer]


def test_what_langchain_is_told_when_the_server_refuses() -> None:
    from langchain_community.llms.chatglm3 import ChatGLM3

    service = service_of("chatglm3-6b", scripted("chatglm3-6b"), strict_model=True)
    with listening(service) as address:
        llm = ChatGLM3(endpoint_url=f"{address}/v1/chat/completions", model="other")
        with pytest.raises(ValueError, match="404"):
            llm.invoke("hello")


# openai


def test_openai_chat_is_greedy_as_generate(glm3: str) -> None:
    import torch

    from glmquant.prompts import prompt_for

    prompt, model = prompt_for(tokenizer_of("chatglm3-6b")), tiny_model("chatglm3-6b")
    client = openai.OpenAI(base_url=f"{glm3}/v1", api_key="none", max_retries=0)
    for text in ("hello", "the quick brown fox", "你好世界"):
        ids = prompt.ids(text, [])
        output = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=prompt.stop_ids(),
            top_p=None, temperature=None,
        )  # fmt: skip
        new = [row for row in output[0, len(ids) :].tolist() if row not in prompt.stop_ids()]
        arguments = {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 12,
        }
        answer = client.chat.completions.create(**arguments)
        # What was generated as raw text; the answer is that, stripped of what the format says is not content.
        raw = client.completions.create(model="m", prompt=ids, temperature=0, max_tokens=12).choices[0].text
        assert raw == prompt.decode(new).rstrip("\ufffd")
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.choices[0].message.content.strip() in raw
        parts = client.chat.completions.create(**arguments, stream=True)
        streamed = "".join(part.choices[0].delta.content or "" for part in parts)
        assert streamed == answer.choices[0].message.content


def test_openai_seed(glm3: str) -> None:
    client = openai.OpenAI(base_url=f"{glm3}/v1", api_key="none")

    def answer(seed: int) -> str:
        reply = client.completions.create(
            model="m", prompt="the", max_tokens=24, seed=seed, temperature=1.5, top_p=1
        )
        return reply.choices[0].text

    with ThreadPoolExecutor(4) as pool:
        first, second, *others = pool.map(answer, [1, 1, 2, 3])
    assert first == second
    assert any(other != first for other in others)


def test_openai_models_and_errors(glm3: str) -> None:
    client = openai.OpenAI(base_url=f"{glm3}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["chatglm3-6b"]
    assert client.models.retrieve("chatglm3-6b").id == "chatglm3-6b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[])
    assert (caught.value.param, caught.value.type) == ("messages", "invalid_request_error")


def test_openai_calls_a_tool_and_hands_back_its_result() -> None:
    """The whole round: offer, call, result, answer."""

    def answer(prompt: str) -> str:
        if "<|observation|>" in prompt:
            return "\n It rains."
        return "get_weather\n ```python\ntool_call(city='Oslo')\n```"

    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    with listening(service_of("chatglm3-6b", scripted("chatglm3-6b", answer, context=2000))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        messages = [{"role": "user", "content": "Weather in Oslo?"}]
        first = client.chat.completions.create(model="m", messages=messages, tools=[tool]).choices[0]
        (call,) = first.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
        messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        second = client.chat.completions.create(model="m", messages=messages, tools=[tool]).choices[0]
        assert (second.message.content, second.finish_reason) == ("It rains.", "stop")


def test_openai_async_and_many_at_once(glm3: str) -> None:
    import asyncio

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{glm3}/v1", api_key="none", timeout=120) as client:
            replies = [
                client.chat.completions.create(model="m", messages=USER, max_tokens=8, temperature=0)
                for _ in range(12)
            ]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*replies)]

    assert len(set(asyncio.run(main()))) == 1


def test_a_key_is_wanted() -> None:
    service = service_of("chatglm3-6b", scripted("chatglm3-6b"))
    with listening(service, api_key="clé 密") as address, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
    with listening(service_of("chatglm3-6b", scripted("chatglm3-6b")), api_key="right") as address:
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="right").models.list().data
        for path in ("/v1/models", "/metrics", "/nowhere"):
            for header in (
                {},
                {"Authorization": "right"},
                {"Authorization": "Basic right"},
                {"Authorization": "Bearer"},
            ):
                refused = httpx.get(address + path, headers=header)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.post(address, json={"prompt": "x"}).status_code == 401
        assert httpx.get(address + "/health").status_code == 200
        assert httpx.get(address).status_code == 200
