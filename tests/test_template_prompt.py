"""Tokenizers that are none of THUDM's, but say in a chat template how to talk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_chat import Script
from helpers_tokenizers import Case, configure, make_case, write_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import glmquant
from glmquant.errors import UsageError
from glmquant.prompts import GLM4Prompt, TemplatePrompt, prompt_for

WORDS = ["<unk>", "<end>", "user:", "assistant:", "system:", "hello", "there", "be", "brief"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, unk_token="<unk>")
    made.chat_template = template
    return made


def test_ids_are_those_of_the_template() -> None:
    prompt = prompt_for(tokenizer())
    assert isinstance(prompt, TemplatePrompt)
    history = prompt.history([{"role": "system", "content": "be brief"}])
    assert prompt.ids("hello", history) == [4, 7, 8, 1, 2, 5, 1, 3]
    assert prompt.stop_ids() == [1]
    answer, history = prompt.reply(prompt.decode([5, 6, 1]), "hello", history)
    assert answer == "hello there"
    assert [m["role"] for m in history] == ["system", "user", "assistant"]
    assert history[-1]["content"] == "hello there"


def test_shorten() -> None:
    prompt = prompt_for(tokenizer())
    system = {"role": "system", "content": "be brief"}
    said = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    shorter = prompt.shorten([system, *said])
    assert shorter == [system, *said[2:]]
    assert prompt.shorten(shorter) == [system]
    assert prompt.shorten([system]) is None
    assert prompt.shorten([]) is None


@pytest.mark.parametrize(
    "history", [5, "hello", [("hello", "there")], [{"role": "user"}], [{"content": "hello"}]]
)
def test_history_of_the_wrong_form(history: object) -> None:
    with pytest.raises(UsageError):
        prompt_for(tokenizer()).history(history)


def test_a_conversation_that_the_template_refuses() -> None:
    with pytest.raises(UsageError, match="chat template refuses this conversation: no tools"):
        prompt_for(tokenizer()).ids("hello", [], role="tool")


def test_without_a_template_or_an_end() -> None:
    with pytest.raises(UsageError, match=r"is not a tokenizer of ChatGLM-6B.*and has no chat template"):
        prompt_for(tokenizer(template=None))
    with pytest.raises(UsageError, match="states no eos_token"):
        prompt_for(tokenizer(eos=None))


# The published template of GLM-4-9B-chat, with less to say about tools; and what sets later models apart.
GLM4 = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\nTools: "
    "{{ item['tools'] | tojson }}{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n"
    "{{ item['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LATER = GLM4.replace("<|assistant|>", "<|assistant|>\n")
TOOLS = GLM4.replace("Tools: ", "# Tools: ").replace("item['tools'] is defined", "tools")


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """GLM-4's special tokens behind a small vocabulary, as a fast tokenizer."""
    root = tmp_path_factory.mktemp("glm4")
    (root / "source").mkdir()
    write_ranks(root / "source")
    configure(root / "source", tokenizer_class="ChatGLM4Tokenizer", model_max_length=64)
    return make_case("glm4", root / "source", root / "out")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (None, GLM4Prompt),
        (GLM4, GLM4Prompt),
        (LATER, TemplatePrompt),
        (TOOLS, TemplatePrompt),
        ("{{ raise_exception('no') }}", TemplatePrompt),
    ],
    ids=["none", "published", "later", "other-tools", "refuses"],
)
def test_a_template_of_its_own_is_followed(
    glm4: Case, monkeypatch: pytest.MonkeyPatch, template: str | None, prompt: type
) -> None:
    monkeypatch.setattr(glm4.tokenizer, "chat_template", template)
    for encode in (False, True):
        assert type(prompt_for(glm4.tokenizer, encode_special_tokens=encode)) is prompt


CONFIGS = [(GlmConfig, GlmForCausalLM), (Glm4Config, Glm4ForCausalLM)]


@pytest.mark.parametrize(("config", "model"), CONFIGS, ids=["glm", "glm4"])
def test_chat_in_folders_of_later_models(
    glm4: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, model: type[PreTrainedModel]
) -> None:
    """GLM-4-9B-chat-hf and GLM-4-0414: the folder's template, and the stop list of its generation_config."""
    monkeypatch.setattr(glm4.tokenizer, "chat_template", LATER)
    glm4.tokenizer.save_pretrained(tmp_path)
    user = glm4.tokenizer.convert_tokens_to_ids("<|user|>")
    torch.manual_seed(0)
    small = model(
        config(
            vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=256, pad_token_id=0,
        )
    )  # fmt: skip
    small.generation_config.eos_token_id = [user]
    small.save_pretrained(tmp_path)

    loaded, tokenizer = glmquant.load(tmp_path, device="cpu"), glmquant.load_tokenizer(tmp_path)
    history = [{"role": "user", "content": "then"}, {"role": "assistant", "content": "the"}]
    for query in ("你好", "then"):
        script = Script([*glm4.plain("the 你好"), user, user])
        messages = [*history, {"role": "user", "content": query}]
        answer, after = loaded.chat(tokenizer, query, history, logits_processor=[script])
        assert script.prompt == glm4.chat(messages)
        assert (answer, after) == ("the 你好", [*messages, {"role": "assistant", "content": "the 你好"}])
        script = Script([*glm4.plain("the 你好"), user, user])
        *_, last = loaded.stream_chat(tokenizer, query, history, logits_processor=[script])
        assert last == (answer, after)
        history = after
    greedy = {"do_sample": False, "max_new_tokens": 5}
    assert loaded.chat(tokenizer, "你好", **greedy) == loaded.chat(
        tokenizer, "你好", temperature=0, max_new_tokens=5
    )
