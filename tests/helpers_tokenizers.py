"""Tokenizers for the tests: the published vocabularies where they are at hand, and small ones made on the spot.

The vocabularies are not part of this repository. Tests that need them look for a folder that has
``tokenizers/<model>/tokenizer.model`` and ``golden/<model>/tokenizer_expected.json``: the one that
GLMQUANT_SHARED names, or ``shared`` beside the repository. Without it they are skipped.
"""

from __future__ import annotations

import atexit
import base64
import functools
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glmquant.tokenizers import fast_tokenizer_files

REPOSITORY = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GLMQUANT_SHARED", REPOSITORY.parent / "shared"))
CONFIGS = REPOSITORY / "tests/golden/published-configs"
NATIVE = {"model_type": "glm", "architectures": ["GlmForCausalLM"]}


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
        return golden_tokenizer(self.name)

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


def require_published(name: str) -> None:
    """Skip the test where the vocabulary of a published model is not at hand."""
    for needed in (f"tokenizers/{name}", f"golden/{name}/tokenizer_expected.json"):
        if not (SHARED / needed).exists():
            pytest.skip(f"{SHARED / needed} is missing: vocabularies are not in the repository")


def golden_tokenizer(name: str) -> dict[str, Any]:
    path = SHARED / "golden" / name / "tokenizer_expected.json"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def scratch() -> Path:
    """A folder for what is made once and used by many tests."""
    folder = Path(tempfile.mkdtemp(prefix="glmquant-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def original_folder(name: str) -> Path:
    """The tokenizer files of a published model with its config.json, as THUDM's folder has them."""
    require_published(name)
    folder = scratch() / name
    vocabulary = name.removesuffix("-32k")
    shutil.copytree(SHARED / "tokenizers" / vocabulary, folder)
    for file in (folder, *folder.iterdir()):
        file.chmod(0o755)
    shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
    return folder


@functools.cache
def published(name: str) -> Case:
    """A published tokenizer and the fast one made of it."""
    return make_case(name, original_folder(name), scratch() / f"{name}-fast")


def pieces_of(case: Case) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(case.source / "tokenizer.model"))


def messages_of(name: str, conversation: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" in conversation:
        return conversation["messages"]
    if name == "chatglm3-6b":
        return [*conversation["history"], {"role": conversation["role"], "content": conversation["query"]}]
    turns = [text for turn in conversation["history"] for text in turn] + [conversation["query"]]
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]


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


def write_ranks(folder: Path, words: Sequence[str] = ("the", "then", "你好", "  ")) -> None:
    """A tiktoken vocabulary: the single bytes, then every beginning of every word."""
    tokens = [bytes([i]) for i in range(256)]
    for word in words:
        data = word.encode()
        tokens += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in tokens]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
