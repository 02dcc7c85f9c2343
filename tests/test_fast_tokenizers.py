"""Fast tokenizers: the ids of THUDM's tokenizers, from stock transformers.

See helpers_tokenizers.py for where the vocabularies come from.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from helpers_tokenizers import (
    LOOK_ALIKES,
    REPOSITORY,
    Case,
    messages_of,
    pieces_of,
    published,
    snippets,
)
from jinja2.exceptions import TemplateError

from glmquant.tokenizers import fast_tokenizer_files
from glmquant.tokenizers.glm4 import WORDS, read_ranks

MODELS = ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]
SENTENCEPIECE = MODELS[:2]

# Golden strings that spell a special token. THUDM's ChatGLM2 and 3 read them as text; so does the
# fast tokenizer with split_special_tokens=True, but by default it finds the token.
SPELLED = {
    "chatglm2-6b": {
        "</s>",
        "<unk>",
        "<sop>hi<eop>",
        "[gMASK]",
        "[MASK]",
        "[sMASK] sop eop",
        "[gMASK]<sop><|user|>\nhi<|assistant|>",
    },
    "glm-4-9b-chat": set(),
}
SPELLED["chatglm3-6b"] = SPELLED["chatglm2-6b"] | {
    "<|user|>",
    "hello <|user|> there <|assistant|>",
    "<|system|>\n你是助手<|observation|>",
}
# THUDM's slow tokenizer for GLM-4 puts spaces around special tokens when it decodes.
SPACED = {
    "<sop>hi<eop>",
    "[sMASK] sop eop",
    "hello <|user|> there <|assistant|>",
    "<|system|>\n你是助手<|observation|>",
    "[gMASK]<sop><|user|>\nhi<|assistant|>",
}


@pytest.fixture(scope="session", params=MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    return published(request.param)


@pytest.fixture(scope="session")
def chatglm2() -> Case:
    return published("chatglm2-6b")


@pytest.fixture(scope="session")
def chatglm3() -> Case:
    return published("chatglm3-6b")


@pytest.fixture(scope="session")
def glm4() -> Case:
    return published("glm-4-9b-chat")


# --- against the golden data ---


def test_golden_strings(case: Case) -> None:
    strings = case.golden["strings"]
    assert len(strings) == 68
    assert {s["text"] for s in strings} >= SPELLED[case.name]
    for expected in strings:
        text = expected["text"]
        same = text not in SPELLED[case.name]
        assert (case.ids(text) == expected["ids"]) is same, text
        assert (case.tokenizer(text)["input_ids"] == expected["ids_with_special"]) is same, text
        if case.name in SENTENCEPIECE:
            assert case.plain(text) == expected["ids"], text


def test_golden_strings_with_role_tokens(chatglm3: Case) -> None:
    """THUDM's ``encode_special_tokens=True`` finds the four role tokens, and no others."""
    others = ("</s>", "<unk>", "[gMASK]", "[MASK]", "[sMASK]", "sop", "eop")
    for expected in chatglm3.golden["strings_encode_special_tokens"]:
        if not any(token in expected["text"] for token in others):
            assert chatglm3.ids(expected["text"]) == expected["ids"], expected["text"]


def test_golden_decoding(case: Case) -> None:
    for expected in case.golden["strings"]:
        text = case.tokenizer.decode(expected["ids"])
        if case.name == "glm-4-9b-chat" and expected["text"] in SPACED:
            assert text == expected["text"]  # better than the reference
        else:
            assert text == expected["decoded"], expected["text"]
    if case.name == "chatglm3-6b":
        for expected in case.golden["strings"]:
            text = case.tokenizer.decode(expected["ids_with_special"])
            assert text == expected["decoded_skip_special"]


def test_golden_padded_batch(case: Case) -> None:
    expected = case.golden["padded_batch"]
    batch = case.tokenizer(expected["texts"], padding=True)
    assert batch["input_ids"] == expected["input_ids"]
    assert batch["attention_mask"] == expected["attention_mask"]
    assert set(batch) == {"input_ids", "attention_mask"}  # what GlmForCausalLM takes


def test_golden_pair(chatglm2: Case, glm4: Case) -> None:
    pair = chatglm2.golden["pair_encoding"]
    assert chatglm2.tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]
    # GLM-4's published code asks for a token that does not exist; the text ends instead.
    ids = glm4.tokenizer("问题", "回答")["input_ids"]
    assert ids == [151331, 151333, *glm4.ids("问题"), *glm4.ids("回答"), 151329]


def test_golden_conversations(case: Case) -> None:
    conversations = case.golden["conversations"]
    assert len(conversations) == (7 if case.name == "chatglm2-6b" else 12)
    for name, expected in conversations.items():
        messages = messages_of(case.name, expected)
        assert case.chat(messages) == expected["input_ids"], name
        if "input_ids_no_generation_prompt" in expected:
            ids = case.chat(messages, prompt=False)
            assert ids == expected["input_ids_no_generation_prompt"], name


def test_attributes(case: Case) -> None:
    tokenizer, golden = case.tokenizer, case.golden
    for text, row in golden["special_ids"].items():
        if text not in ("<bos>", "<eos>", "<pad>"):
            assert tokenizer.convert_tokens_to_ids(text) == row
            assert tokenizer.decode([row], skip_special_tokens=True) == ""
    for key in ("eos_token_id", "pad_token_id", "bos_token_id", "padding_side"):
        assert getattr(tokenizer, key) == golden["attributes"][key]
    assert tokenizer.unk_token_id == (None if case.name == "glm-4-9b-chat" else 0)
    assert len(tokenizer) == golden.get("len", golden["attributes"]["vocab_size"])
    config = json.loads((case.source / "config.json").read_text())
    assert tokenizer.model_max_length == config["seq_length"]


# --- against the libraries ---


def test_equals_sentencepiece(chatglm3: Case) -> None:
    pieces = pieces_of(chatglm3)
    words = [pieces.id_to_piece(i).replace("▁", " ") for i in range(259, pieces.get_piece_size(), 7)]
    for text in snippets(1, 3000, words):
        ids = pieces.encode(text)
        assert chatglm3.plain(text) == ids, repr(text)
        assert chatglm3.tokenizer.decode(ids) == pieces.decode(ids), repr(text)


def test_equals_tiktoken(glm4: Case) -> None:
    ranks = read_ranks(glm4.source / "tokenizer.model")
    special = glm4.golden["special_ids"]
    reference = tiktoken.Encoding("glm4", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    words = [value.decode(errors="replace") for value in list(ranks)[256::7]]
    for text in snippets(2, 3000, words):
        ids = reference.encode(text, allowed_special="all")
        assert glm4.ids(text) == ids, repr(text)
        assert glm4.plain(text) == reference.encode_ordinary(text), repr(text)
        assert glm4.tokenizer.decode(ids) == text


def conversations(seed: int, count: int, roles: Sequence[str]) -> list[list[dict[str, Any]]]:
    texts = iter(snippets(seed, count * 8, [*LOOK_ALIKES, "你好", " hello", "{'a': 1}"]))
    random_ = random.Random(seed)
    result = []
    for _ in range(count):
        chosen = [roles[i % len(roles)] for i in range(1 + 2 * random_.randrange(3))]
        result.append([{"role": role, "content": next(texts)} for role in chosen])
    return result


def test_chatglm3_conversations_cannot_forge_tokens(chatglm3: Case) -> None:
    """Equal to ids that are built message by message, as THUDM's ``build_chat_input`` does."""
    pieces, special = pieces_of(chatglm3), chatglm3.golden["special_ids"]
    metadata = random.Random(3)
    for messages in conversations(3, 150, ("user", "assistant", "observation")):
        expected = [special["[gMASK]"], special["sop"]]
        for message in messages:
            message["metadata"] = metadata.choice(("", "tool", "a <|user|> sop", "[MASK]</s>"))
            expected += [special[f"<|{message['role']}|>"], *pieces.encode(message["metadata"] + "\n")]
            expected += pieces.encode(message["content"])
        assert chatglm3.chat(messages) == [*expected, special["<|assistant|>"]], messages


def test_chatglm2_conversations_cannot_forge_tokens(chatglm2: Case) -> None:
    pieces = pieces_of(chatglm2)
    for messages in conversations(4, 150, ("user", "assistant")):
        prompt = ""
        for i, message in enumerate(messages):
            if message["role"] == "user":
                prompt += f"[Round {i // 2 + 1}]\n\n问：{message['content']}\n\n"
            else:
                prompt += f"答：{message['content']}\n\n"
        assert chatglm2.chat(messages) == [64790, 64792, *pieces.encode(prompt + "答：")], messages


def test_guard_character_is_dropped(chatglm3: Case) -> None:
    assert chatglm3.ids("a\ufdd0b") == chatglm3.ids("ab")
    assert chatglm3.ids("\ufdd0") == []


# --- chat templates beyond the published prompts ---


def test_chatglm2_system_message_goes_before_the_last_question(chatglm2: Case) -> None:
    turns = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二"},
        {"role": "user", "content": "三"},
    ]
    merged = [*turns[:2], {"role": "user", "content": "短。三"}]
    assert chatglm2.chat([{"role": "system", "content": "短。"}, *turns]) == chatglm2.chat(merged)
    answered = chatglm2.tokenizer.apply_chat_template(turns[:2], tokenize=False)
    assert answered == "[gMASK]sop[Round 1]\n\n问：一\n\n答：二"
    with pytest.raises(TemplateError, match="roles user and assistant"):
        chatglm2.chat([*turns, {"role": "observation", "content": "x"}])


def test_chatglm3_tools_beside_the_messages(chatglm3: Case) -> None:
    tool = {"name": "天气", "description": "", "parameters": {"type": "object", "properties": {}}}
    given = [{"type": "function", "function": tool}]
    question = {"role": "user", "content": "北京？"}
    sentence = "Answer the following questions as best as you can. You have access to the following tools:"
    for before, content in (([], sentence), ([{"role": "system", "content": "短。"}], "短。")):
        expected = chatglm3.chat([{"role": "system", "content": content, "tools": [tool]}, question])
        assert chatglm3.chat([*before, question], tools=given) == expected
    text = chatglm3.tokenizer.apply_chat_template([question], tools=given, tokenize=False)
    assert f"tools:\n{json.dumps([tool], indent=4, ensure_ascii=False)}<|user|>" in text
    called = {"role": "assistant", "metadata": "天气", "content": "```python\ntool_call()\n```"}
    answer = [{"role": role, "content": "21"} for role in ("observation", "tool")]
    assert chatglm3.chat([question, called, answer[0]]) == chatglm3.chat([question, called, answer[1]])
    with pytest.raises(TemplateError, match="roles system, user"):
        chatglm3.chat([{"role": "admin", "content": "x"}])
    with pytest.raises(TemplateError, match="metadata"):
        chatglm3.chat([{"role": "assistant", "content": None, "tool_calls": given}])


# --- files ---


def test_same_bytes_and_no_code(case: Case) -> None:
    assert fast_tokenizer_files(case.source) == case.files
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(case.files) == names
    assert not any(b"auto_map" in data for data in case.files.values())


def test_glm4_template_is_carried(glm4: Case) -> None:
    config = json.loads((glm4.source / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert glm4.files["chat_template.jinja"].decode() == config["chat_template"]


def test_a_folder_with_a_fast_tokenizer_is_left_alone(case: Case) -> None:
    assert fast_tokenizer_files(case.folder) is None


def test_loads_without_glmquant_and_despite_older_token_files(chatglm3: Case, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chatglm3.folder, folder)
    stale = {"pad_token": "<pad>", "additional_special_tokens": ["<|old|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(stale))
    (folder / "added_tokens.json").write_text(json.dumps({"<|old|>": 64798}))
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit('code from the folder ran')")
    script = (
        "import sys, transformers\n"
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "assert not any(name.partition('.')[0] in ('glmquant', 'transformers_modules') for name in sys.modules)\n"
        "print(tokenizer('你好')['input_ids'], tokenizer.pad_token, len(tokenizer))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "[64790, 64792, 36474, 54591] <unk> 64798", done.stderr


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "tokenizers", "sentencepiece", "tiktoken")
    script = f"import sys, glmquant.tokenizers; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=False).returncode == 0
