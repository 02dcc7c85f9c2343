"""stream_chat: the answer as it grows, whole characters only, and generation that ends when nobody listens."""

from __future__ import annotations

import collections
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers_chat import ROWS, SOURCES, Script, small_model, tokenizer_of
from helpers_tokenizers import golden_tokenizer

import glmquant
from glmquant.errors import UsageError
from glmquant.models.chat import ChatCache
from glmquant.models.streaming import Transcript, generate_tokens
from glmquant.prompts import Prompt, prompt_for

WITH_ROLES = ("chatglm3-6b", "glm-4-9b-chat")  # an answer begins with a line for metadata
EMOJI = "表情👋🏽 and 👨\u200d👩\u200d👧\u200d👦, é，完。\n```python\n    x = 1\n```"


def answer_ids(name: str, source: str, text: str) -> list[int]:
    prompt = prompt_for(tokenizer_of(name, source))
    return [*prompt.plain(text), prompt.stop_ids()[0]]


def generating() -> bool:
    return any(thread.name == "glmquant-generate" for thread in threading.enumerate())


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_grows_by_whole_characters(name: str, source: str) -> None:
    model, tokenizer = small_model(name), tokenizer_of(name, source)
    ids = answer_ids(name, source, ("\n" if name in WITH_ROLES else "") + EMOJI)
    answer, history = model.chat(tokenizer, "你好", logits_processor=[Script(ids)])
    parts = list(model.stream_chat(tokenizer, "你好", logits_processor=[Script(ids)]))
    assert parts[-1] == (answer, history)
    assert "👋🏽" in answer
    texts = [text for text, _ in parts]
    for shorter, longer in itertools.pairwise(texts):
        assert len(shorter) <= len(longer)
        # ChatGLM-6B's marks become full-width once a Chinese character follows.
        assert longer.startswith(shorter[:-1])
    assert not any("\ufffd" in text for text in texts)
    assert len(parts) > len(ids) // 3
    assert not generating()


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_an_answer_that_is_cut_inside_a_character(name: str, source: str) -> None:
    model, tokenizer = small_model(name), tokenizer_of(name, source)
    ids = answer_ids(name, source, "👋👋")
    for length in range(1, len(ids)):
        options = {"max_new_tokens": length}
        parts = list(model.stream_chat(tokenizer, "你好", logits_processor=[Script(ids)], **options))
        assert parts, length
        assert not any("\ufffd" in text for text, _ in parts)
        assert parts[-1] == model.chat(tokenizer, "你好", logits_processor=[Script(ids)], **options)


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_equals_chat_on_what_a_model_says(name: str, source: str) -> None:
    model, tokenizer = small_model(name), tokenizer_of(name, source)
    greedy = {"do_sample": False, "max_new_tokens": 40}
    *_, last = glmquant.stream_chat(model, tokenizer, "介绍一下清华大学", **greedy)
    assert last == glmquant.chat(model, tokenizer, "介绍一下清华大学", **greedy)


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_transcript_equals_decoding_at_once(name: str, source: str) -> None:
    """For the golden strings, and for all of them in a row, at every step."""
    prompt = prompt_for(tokenizer_of(name, source))
    strings = [prompt.plain(entry["text"]) for entry in golden_tokenizer(name)["strings"]]
    for ids in [*strings, list(itertools.chain(*strings))]:
        transcript = Transcript(prompt.decode)
        for end, row in enumerate(ids, 1):
            if transcript.add(row) and len(ids) < 200:
                assert transcript.text == prompt.decode(ids[:end])
        assert transcript.whole() == prompt.decode(ids).rstrip("\ufffd")
        # At most an unfinished character is missing, or a space that more text would show.
        assert transcript.whole().startswith(transcript.text.rstrip("\ufffd"))
        assert len(transcript.whole()) - len(transcript.text) <= 1


def silent(prompt: Prompt) -> list[int]:
    """Ids that show nothing, of those where they are found."""
    count = len(prompt.tokenizer)
    return [row for row in (*range(300), *range(count - 300, count)) if not prompt.decode([row])]


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_white_space_and_what_shows_nothing(name: str, source: str) -> None:
    """Models repeat themselves, and line breaks and control tokens, too; their cost is that of other ids."""
    prompt = prompt_for(tokenizer_of(name, source))
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return prompt.decode(ids)

    shown = prompt.plain(EMOJI)
    spaces = {
        text: prompt.plain(f"a{text}b")[1:-1] or prompt.plain(text) for text in ("\n", "  ", "\t", "\u3000")
    }
    nothing = silent(prompt)[:3]
    for run in (*spaces.values(), *([row] for row in nothing), nothing + spaces["\n"]):
        for start in ([], shown):
            ids = [*start, *run * 200, *shown, *run * 20, *shown]
            transcript = Transcript(decode)
            decoded = 0
            for end, row in enumerate(ids, 1):
                if transcript.add(row) and end % 7 == 0:
                    assert transcript.text == prompt.decode(ids[:end])
            assert decoded < 80 * len(ids)
            assert transcript.text == prompt.decode(ids)


@pytest.mark.parametrize(("name", "source"), SOURCES)
def test_any_mixture(name: str, source: str) -> None:
    prompt = prompt_for(tokenizer_of(name, source))
    pieces = [
        prompt.plain(text) for text in ("\n", " ", "    ", "\t", "\u3000", "a", " b", "好", "👋", "\n\n", ",")
    ]
    pieces += [[row] for row in silent(prompt)[:2]]
    for seed in range(15):
        some = random.Random(seed)
        kept = some.sample(pieces, 3)
        ids = [row for _ in range(80) for row in some.choice(kept)]
        transcript = Transcript(prompt.decode)
        for end, row in enumerate(ids, 1):
            if transcript.add(row):
                assert transcript.text == prompt.decode(ids[:end]), (seed, ids[:end])


def test_bytes_that_are_no_text() -> None:
    """Held back for a while, then shown as what they are; text that follows is not lost."""
    tokenizer = tokenizer_of("chatglm3-6b")
    byte, word = tokenizer.convert_tokens_to_ids("<0xFF>"), tokenizer.convert_tokens_to_ids("好")
    transcript = Transcript(prompt_for(tokenizer).decode)
    for row in [word, *[byte] * 40, word]:
        transcript.add(row)
    assert transcript.text == "好" + "\ufffd" * 40 + "好"


def test_a_space_between_two_pieces_that_bring_their_own() -> None:
    """Decoding takes the first space of a text away, so no text may begin with a piece that is only a space."""
    pieces = [" This", " ", " (", " as"]
    transcript = Transcript(lambda ids: "".join(pieces[i] for i in ids).lstrip(" "))
    shown = [transcript.text for row in range(4) if transcript.add(row)]
    assert shown == ["This", "This ", "This  (", "This  ( as"]
    assert transcript.whole() == shown[-1]


LEFT_RUNNING = """
import signal, sys, torch
from transformers import GlmConfig, GlmForCausalLM
from glmquant.models.streaming import generate_tokens
config = GlmConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=10**5, pad_token_id=0,
)
tokens = generate_tokens(
    GlmForCausalLM(config).eval(), torch.tensor([[1, 2]]), max_new_tokens=10**4, eos_token_id=None
)
next(tokens)
print("end")
"""


def test_a_stream_that_is_left_open_when_the_program_ends() -> None:
    ended = subprocess.run([sys.executable, "-c", LEFT_RUNNING], capture_output=True, text=True, timeout=120)
    assert (ended.stdout, ended.returncode) == ("end\n", 0), ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs pthread_kill")
def test_ctrl_c_while_the_last_token_is_computed() -> None:
    """The thread is waited for all the same, and the program learns of it."""
    model = small_model("chatglm2-6b")
    busy = threading.Event()

    def slow(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 2:
            busy.set()
            time.sleep(0.5)
            busy.clear()
        return scores

    tokens = generate_tokens(
        model, torch.tensor([[1]]), max_new_tokens=9, eos_token_id=None, logits_processor=[slow]
    )
    next(tokens)
    busy.wait()
    main = threading.main_thread().ident
    timer = threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tokens.close()
    assert not busy.is_set()
    assert not generating()


def test_time_grows_with_the_length_of_the_answer() -> None:
    """What is decoded at each step does not depend on how long the answer is."""
    prompt = prompt_for(tokenizer_of("chatglm3-6b"))
    ids = prompt.plain(EMOJI * 100)
    decoded = 0

    def decode(some: Any) -> str:
        nonlocal decoded
        decoded += len(some)
        return prompt.decode(some)

    transcript = Transcript(decode)
    for row in ids:
        transcript.add(row)
    assert len(ids) > 3000
    assert decoded < 25 * len(ids)


@pytest.mark.parametrize("leave", ["close", "break", "delete", "error"])
def test_generation_ends_when_nobody_listens(leave: str) -> None:
    model, tokenizer = small_model("chatglm2-6b"), tokenizer_of("chatglm2-6b")
    row = tokenizer.convert_tokens_to_ids("好")
    stream = model.stream_chat(
        tokenizer, "你好", logits_processor=[Script([row] * 10000)], max_new_tokens=9000
    )
    assert next(stream)[0] == "好"
    assert generating()
    if leave == "close":
        stream.close()
    elif leave == "break":
        for text, _ in stream:
            if len(text) > 3:
                break
        del stream
    elif leave == "delete":
        del stream
    else:
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError())
    assert not generating()
    computed = model.forwarded
    time.sleep(0.05)
    assert model.forwarded == computed


def test_ctrl_c_stops_the_answer() -> None:
    model, tokenizer = small_model("chatglm2-6b"), tokenizer_of("chatglm2-6b")
    row = tokenizer.convert_tokens_to_ids("好")
    stream = model.stream_chat(
        tokenizer,
        "你好",
        logits_processor=[Script([row] * 10000)],
        max_new_tokens=9000,
        return_past_key_values=True,
    )
    last = collections.deque([next(stream)], maxlen=1)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        last.extend(stream)
    _, history, cache = last[0]
    assert not generating()
    assert history[-1][1].startswith("好好")
    assert len(cache.token_ids) == cache.get_seq_length() > 2


def test_nothing_runs_before_the_first_step() -> None:
    model, tokenizer = small_model("chatglm2-6b"), tokenizer_of("chatglm2-6b")
    stream = model.stream_chat(tokenizer, "你好")
    assert not generating()
    stream.close()


def test_an_error_while_generating_arrives() -> None:
    def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")

    model, tokenizer = small_model("chatglm2-6b"), tokenizer_of("chatglm2-6b")
    cache = ChatCache(model.config)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(model.stream_chat(tokenizer, "你好", logits_processor=[broken], past_key_values=cache))
    assert not generating()
    assert cache.get_seq_length() == 0
    with pytest.raises(RuntimeError, match="on purpose"):
        list(generate_tokens(model, torch.tensor([[1]]), logits_processor=[broken], max_new_tokens=1))


def test_mistakes_are_told_at_the_call() -> None:
    model, tokenizer = small_model("chatglm3-6b"), tokenizer_of("chatglm3-6b")
    for options, message in (
        ({"history": ["a"]}, "list of messages"),
        ({"num_beams": 2}, "cannot take num_beams"),
        ({"streamer": object()}, "cannot take streamer"),
        ({"past_key_values": ((1, 2),)}, "not tuple"),
        ({"max_length": 2}, "is the limit"),
    ):
        with pytest.raises(UsageError, match=message):
            model.stream_chat(tokenizer, "你好", **options)
    with pytest.raises(UsageError, match="cannot reuse past_key_values"):
        small_model("chatglm-6b").stream_chat(tokenizer_of("chatglm-6b"), "你好", return_past_key_values=True)


# --- keys and values from one turn to the next ---


def as_read_back(name: str, query: str, answer: str) -> list[int]:
    """The ids of an answer as the next prompt has them, which is how a trained model writes them."""
    prompt = prompt_for(tokenizer_of(name))
    asked = prompt.ids(query, [])
    if name not in WITH_ROLES:
        return prompt.plain(prompt.text(query, []) + answer)[len(asked) - 2 :]
    history = [{"role": "user", "content": query}, {"role": "assistant", "metadata": "", "content": answer}]
    full = prompt.ids("?", history)
    return full[len(asked) : full.index(prompt.token("<|user|>"), len(asked))]


@pytest.mark.parametrize("name", list(ROWS)[1:])
def test_reusing_keys_and_values_changes_nothing_but_the_work(name: str) -> None:
    model, tokenizer = small_model(name), tokenizer_of(name)
    prompt = prompt_for(tokenizer)
    first = as_read_back(name, "你好", "你好！我是人工智能助手，很高兴见到你。")
    plain: Any = None
    history: Any = None
    cache = None
    for query, script in (
        ("你好", [*first, prompt.stop_ids()[0]]),
        ("晚上睡不着应该怎么办", None),
        ("谢谢", None),
    ):

        def options(script: list[int] | None = script) -> dict[str, Any]:
            processors = [Script(script)] if script else []
            return {"do_sample": False, "max_new_tokens": 24, "logits_processor": processors}

        prompt_ids = prompt.ids(query, prompt.history(history))
        expected, plain = model.chat(tokenizer, query, plain, **options())
        before, kept = model.forwarded, 0 if cache is None else cache.get_seq_length()
        *_, (response, history, cache) = model.stream_chat(
            tokenizer, query, history, past_key_values=cache, return_past_key_values=True, **options()
        )
        assert (response, history) == (expected, plain)
        assert cache.token_ids[: len(prompt_ids)] == prompt_ids
        assert len(cache.token_ids) == cache.get_seq_length()
        if query == "晚上睡不着应该怎么办":
            # The first prompt and all of its answer are not computed again.
            assert kept == len(prompt.ids("你好", [])) + len(first)
            assert model.forwarded - before == len(prompt_ids) - kept + 23


def test_a_cache_from_an_answer_that_was_stopped() -> None:
    name = "chatglm3-6b"
    model, tokenizer = small_model(name), tokenizer_of(name)
    stream = model.stream_chat(
        tokenizer, "你好", do_sample=False, max_new_tokens=500, return_past_key_values=True
    )
    cache = [next(stream)[2] for _ in range(5)][-1]
    stream.close()
    assert 0 < cache.get_seq_length() == len(cache.token_ids) < 40
    greedy = {"do_sample": False, "max_new_tokens": 20}
    *_, (response, history) = model.stream_chat(tokenizer, "你好吗", past_key_values=cache, **greedy)
    assert (response, history) == model.chat(tokenizer, "你好吗", **greedy)


def test_rewinding_a_cache() -> None:
    model = small_model("chatglm2-6b")
    cache = ChatCache(model.config)
    cache.rewind([1, 2, 3])
    assert cache.token_ids == []
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
    cache.record([1, 2, 3])  # the last one is not known
    assert cache.get_seq_length() == 3
    cache.rewind([1, 2, 3])  # one is left to compute
    assert cache.token_ids == [1, 2]
    cache.rewind([1, 5, 6])
    assert cache.token_ids == [1]
    assert cache.get_seq_length() == 1
