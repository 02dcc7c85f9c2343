"""Fast tokenizers: the ids of THUDM's tokenizers, from stock transformers.

The vocabularies are not part of this repository. Tests that need them look for a folder that has
``tokenizers/<model>/tokenizer.model`` and ``golden/<model>/tokenizer_expected.json``: the one that
GLMQUANT_SHARED names, or ``shared`` beside the repository. Without it they are skipped, and small
vocabularies made on the spot stand in for the rest.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glmquant.errors import SourceError
from glmquant.tokenizers import fast_tokenizer_files, kind_of
from glmquant.tokenizers.glm4 import WORDS, read_ranks

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GLMQUANT_SHARED", REPOSITORY.parent / "shared"))
CONFIGS = REPOSITORY / "tests/golden/published-configs"
MODELS = ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]
SENTENCEPIECE = MODELS[:2]
NATIVE = {"model_type": "glm", "architectures": ["GlmForCausalLM"]}

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


@dataclass(frozen=True)
class Case:
    """A published tokenizer and what became of it."""

    name: str
    source: Path
    folder: Path
    files: dict[str, bytes]
    tokenizer: PreTrainedTokenizerFast

    @property
    def golden(self) -> dict[str, Any]:
        path = SHARED / "golden" / self.name / "tokenizer_expected.json"
        return json.loads(path.read_text(encoding="utf-8"))

    def ids(self, text: str, **options: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def plain(self, text: str) -> list[int]:
        return self.ids(text, split_special_tokens=True)

    def chat(self, messages: list[dict[str, Any]], *, prompt: bool = True, **more: Any) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False, **more
        )


def make_case(name: str, source: Path, folder: Path) -> Case:
    files = fast_tokenizer_files(source)
    assert files is not None
    shutil.copytree(source, folder)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(NATIVE))
    return Case(name, source, folder, files, AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The published tokenizers; each is built once."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        for needed in (f"tokenizers/{name}/tokenizer.model", f"golden/{name}/tokenizer_expected.json"):
            if not (SHARED / needed).exists():
                pytest.skip(f"{SHARED / needed} is missing: vocabularies are not in the repository")
        if name not in cases:
            root = tmp_path_factory.mktemp(name)
            shutil.copytree(SHARED / "tokenizers" / name, root / "source")
            shutil.copy(CONFIGS / f"{name}.json", root / "source/config.json")
            cases[name] = make_case(name, root / "source", root / "out")
        return cases[name]

    return get


@pytest.fixture(scope="session", params=MODELS)
def case(request: pytest.FixtureRequest, published: Callable[[str], Case]) -> Case:
    return published(request.param)


@pytest.fixture(scope="session")
def chatglm2(published: Callable[[str], Case]) -> Case:
    return published("chatglm2-6b")


@pytest.fixture(scope="session")
def chatglm3(published: Callable[[str], Case]) -> Case:
    return published("chatglm3-6b")


@pytest.fixture(scope="session")
def glm4(published: Callable[[str], Case]) -> Case:
    return published("glm-4-9b-chat")


def pieces_of(case: Case) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(case.source / "tokenizer.model"))


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


def messages_of(name: str, conversation: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in conversation:
        return conversation["messages"]
    if name == "chatglm3-6b":
        return [*conversation["history"], {"role": conversation["role"], "content": conversation["query"]}]
    turns = [text for turn in conversation["history"] for text in turn] + [conversation["query"]]
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


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

ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
MASKS = ["[gMASK]", "[MASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "<|endoftext|>"]
LOOK_ALIKES = [*ROLES, *MASKS, "</s>", "<s>", "<unk>", "<0x0A>", "▁", "<|", "|>", "[", "]"]
WHITESPACE = [" ", "\n", "\t", "\r", "\x00", "\u3000", "\xa0"]


def snippets(seed: int, count: int, vocabulary: Sequence[str]) -> list[str]:
    """Text that is hard to tokenize: runs, repeats, random characters, pieces, look-alikes."""
    random_ = random.Random(seed)
    ranges = [
        (0, 0x7F),
        (0x80, 0x24FF),
        (0x3000, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFDF0, 0xFFFF),
        (0x10000, 0x2FFFF),
    ]

    def one() -> str:
        match random_.randrange(6):
            case 0:
                parts = [
                    random_.choice("aest 的了一—-=*#.…哈\n\t ▁'") * random_.choice((1, 2, 3, 7, 17))
                    for _ in range(12)
                ]
            case 1:
                parts = [random_.choice(vocabulary) for _ in range(random_.randint(1, 12))]
            case 2:
                parts = [chr(random_.randint(*random_.choice(ranges))) for _ in range(random_.randint(1, 30))]
            case 3:
                piece = random_.choice(vocabulary)
                parts = [(piece * random_.randint(1, 9))[random_.randint(0, len(piece)) :]]
            case 4:
                parts = [random_.choice("ab ") for _ in range(random_.randint(1, 60))]
            case _:
                words = [*LOOK_ALIKES, *WHITESPACE, "hi", "好"]
                parts = [random_.choice(words) for _ in range(random_.randint(1, 8))]
        return "".join(parts)

    return [one() for _ in range(count)]


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


# --- vocabularies made on the spot: these run everywhere ---


def train(folder: Path, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "the quick brown fox jumps over the lazy dog, again and again and again",
        "你好世界，今天天气很好，你好你好",
        "for i in range(10):    print(i, i * i)",
    ]
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 380,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5), model_prefix=str(folder / "tokenizer"), **settings
    )
    return folder


def configure(folder: Path, **tokenizer: Any) -> None:
    config = {"tokenizer_class": "ChatGLMTokenizer", **tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("tiny")
    configure(train(root / "source"), name_or_path="THUDM/chatglm3-6b")
    (root / "source/config.json").write_text(json.dumps({"model_type": "chatglm", "seq_length": 256}))
    return make_case("tiny", root / "source", root / "out")


def write_ranks(folder: Path, words: Sequence[str] = ("the", "then", "你好", "  ")) -> None:
    """A tiktoken vocabulary: the single bytes, then every beginning of every word."""
    tokens = [bytes([i]) for i in range(256)]
    for word in words:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))


def test_tiny_sentencepiece(tiny: Case) -> None:
    pieces = pieces_of(tiny)
    size = pieces.get_piece_size()
    words = [pieces.id_to_piece(i).replace("▁", " ") for i in range(259, size)]
    for text in snippets(5, 300, words):
        assert tiny.plain(text) == pieces.encode(text), repr(text)
    assert tiny.tokenizer("again")["input_ids"] == [size + 1, size + 3, *pieces.encode("again")]
    assert tiny.tokenizer.model_max_length == 256
    ids = tiny.chat([{"role": "user", "content": "<|user|> sop 你好"}])
    content = [*pieces.encode("\n"), *pieces.encode("<|user|> sop 你好")]
    assert ids == [size + 1, size + 3, size + 6, *content, size + 7]


def test_line_breaks_of_an_unfinished_answer(tiny: Case) -> None:
    pieces = pieces_of(tiny)
    ids = pieces.encode("dog\n\n👋")
    assert tiny.tokenizer.decode(ids) == "dog\n\n👋"
    assert tiny.tokenizer.decode(ids[:-1]).startswith("dog\n\n\ufffd")


def test_tiny_tiktoken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_ranks(source)
    configure(source, tokenizer_class="ChatGLM4Tokenizer", model_max_length=64, chat_template=None)
    case = make_case("glm4", source, tmp_path / "out")
    assert set(case.files) == {"tokenizer.json", "tokenizer_config.json"}
    ranks = read_ranks(source / "tokenizer.model")
    reference = tiktoken.Encoding("tiny", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    for text in snippets(6, 300, ["the", " then", "你好", "  "]):
        assert case.plain(text) == reference.encode_ordinary(text), repr(text)
    size = len(ranks)
    assert case.tokenizer("then")["input_ids"] == [size + 2, size + 4, ranks[b"then"]]
    assert case.tokenizer.pad_token_id == case.tokenizer.eos_token_id == size
    assert case.tokenizer.model_max_length == 64


def test_tokens_that_a_fine_tune_added_are_kept(tiny: Case, tmp_path: Path) -> None:
    size = pieces_of(tiny).get_piece_size()
    shutil.copy(tiny.source / "tokenizer.model", tmp_path)

    def record(entries: dict[int, str]) -> None:
        decoder = {str(row): {"content": text, "special": True} for row, text in entries.items()}
        configure(tmp_path, name_or_path="chatglm3", added_tokens_decoder=decoder)

    record({size + 1: "[gMASK]", size + 9: "<|mine|>"})
    case = make_case("added", tmp_path, tmp_path / "out")
    assert case.ids("again<|mine|>")[-1] == size + 9
    for entries, message in (
        ({size + 1: "[oops]"}, r"gives id \d+ to '\[oops\]'"),
        ({size + 12: "<|far|>"}, "skips ids"),
        ({size + 9: "sop"}, "two ids to one token"),
    ):
        record(entries)
        with pytest.raises(SourceError, match=message):
            fast_tokenizer_files(tmp_path)
    configure(tmp_path, added_tokens_decoder={"one": "two"})
    with pytest.raises(SourceError, match="malformed"):
        fast_tokenizer_files(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n", "Git LFS pointer"),
        (b"hello", "damaged, or is not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n%%%% 2\n", "line 3 is not a new token"),
        (b"IQ== 0\nIg== 2\n", "line 2 is not a new token"),
        (b"IQ== 0\nIQ== 1\n", "line 2 is not a new token"),
        (b"IQ== 0\nIg== 1\n", "single bytes"),
    ],
)
def test_damaged_vocabulary(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    configure(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        fast_tokenizer_files(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_truncated_vocabulary(tiny: Case, tmp_path: Path, part: float) -> None:
    data = (tiny.source / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[: int(len(data) * part)])
    configure(tmp_path)
    with pytest.raises(SourceError, match="download the file again"):
        fast_tokenizer_files(tmp_path)


def test_another_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    for options in (
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"byte_fallback": False, "vocab_size": 120},
    ):
        configure(train(tmp_path, **options))
        with pytest.raises(SourceError, match="not of the kind"):
            fast_tokenizer_files(tmp_path)


def test_unknown_pad_token(tmp_path: Path) -> None:
    write_ranks(tmp_path)
    configure(tmp_path, tokenizer_class="ChatGLM4Tokenizer", pad_token={"content": "<pad>"})
    with pytest.raises(SourceError, match=r"pad_token in .* is '<pad>'"):
        fast_tokenizer_files(tmp_path)


TOKENIZER = "tokenizer_config.json"
SLOW = {"tokenizer_class": "ChatGLMTokenizer"}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({TOKENIZER: {**SLOW, "name_or_path": "THUDM/chatglm2-6b"}}, "chatglm2"),
        ({TOKENIZER: {**SLOW, "name_or_path": "THUDM/chatglm3-6b"}}, "chatglm3"),
        ({TOKENIZER: SLOW, "config.json": {"_name_or_path": "/data/chatglm2-6b-32k"}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"_name_or_path": "THUDM/codegeex2-6b"}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 32768}}, "chatglm2"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 32768, "rope_ratio": 50}}, "chatglm3"),
        ({TOKENIZER: SLOW, "config.json": {"seq_length": 8192}}, "chatglm3"),
        ({TOKENIZER: SLOW}, "chatglm3"),
        ({"config.json": {"model_type": "chatglm", "seq_length": 32768}}, "chatglm2"),
        (
            {
                TOKENIZER: {**SLOW, "name_or_path": "chatglm3-like"},
                "tokenization_chatglm.py": "tokens = ['[MASK]', '[gMASK]', 'sop']",
            },
            "chatglm2",
        ),
        (
            {
                TOKENIZER: {**SLOW, "name_or_path": "from-chatglm2"},
                "modeling_chatglm.py": "stop = '<|user|>'; raise SystemExit",
            },
            "chatglm3",
        ),
        ({TOKENIZER: {**SLOW, "chat_template": "[gMASK]sop<|user|>"}}, "chatglm3"),
        ({TOKENIZER: {**SLOW, "added_tokens_decoder": {"64795": {"content": "<|user|>"}}}}, "chatglm3"),
        ({TOKENIZER: {"tokenizer_class": "ChatGLM4Tokenizer"}}, "glm4"),
        ({TOKENIZER: {"tokenizer_class": "LlamaTokenizer"}}, None),
        ({"config.json": {"model_type": "llama"}}, None),
        ({TOKENIZER: SLOW, "tokenizer.json": {}}, None),
    ],
)
def test_kind(tmp_path: Path, files: dict[str, Any], kind: str | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert kind_of(tmp_path) == kind


def test_other_folders_have_no_kind(tmp_path: Path) -> None:
    assert fast_tokenizer_files(tmp_path) is None
    (tmp_path / "ice_text.model").write_bytes(b"\x0a\x0e")  # ChatGLM-6B
    configure(tmp_path)
    assert fast_tokenizer_files(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert kind_of(tmp_path) == "glm4"  # by its content, whatever the class is called
    (tmp_path / TOKENIZER).write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        fast_tokenizer_files(tmp_path)
