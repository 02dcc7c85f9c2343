"""`chat` and `stream_chat`: THUDM's methods for every generation, on any model that can generate.

ChatGLM-6B and ChatGLM2-6B take and return the history as (query, answer) pairs, ChatGLM3-6B and GLM-4-9B-chat as
messages; what a prompt looks like is in `glmquant.prompts`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ..errors import UsageError
from ..prompts import History, Prompt, Response, prompt_for
from .streaming import Transcript, generate_tokens

# When the history is shortened, this part of the context is made free for the answer.
_ROOM = 4


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Chooses a harmless token where a half precision model produced no numbers.

    A row of scores with NaN or infinity becomes 0, with 5e4 at `fallback`, as in THUDM's code. Unlike there, minus
    infinity alone is let pass: that is how other processors forbid a token.
    """

    def __init__(self, fallback: int) -> None:
        self.fallback = fallback

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` [batch, vocab] with invalid rows replaced."""
        invalid = (scores.isnan() | scores.isposinf()).any(-1) | ~scores.isfinite().any(-1)
        harmless = torch.zeros_like(scores[:1])
        harmless[:, self.fallback] = 5e4
        return torch.where(invalid[:, None], harmless, scores)


class ChatCache(DynamicCache):
    """Keys and values of a conversation, and the ids that they belong to.

    Attributes:
        token_ids: one id for each cached position.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.token_ids: list[int] = []

    def rewind(self, ids: Sequence[int]) -> None:
        """Keep what can be used for the prompt `ids`: what both begin with, but at least one id stays to compute."""
        same = 0
        for old, new in zip(self.token_ids, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        if same < self.get_seq_length():
            self.crop(same - self.get_seq_length())
        self.token_ids = list(ids[:same])

    def record(self, ids: Sequence[int]) -> None:
        """Note which `ids` are cached; after an interruption there may be more, which cannot be known."""
        extra = self.get_seq_length() - len(ids)
        if extra > 0:
            self.crop(-extra)
        self.token_ids = list(ids[: self.get_seq_length()])


@dataclass(frozen=True)
class _Request:
    """What is asked of a model, checked and encoded."""

    prompt: Prompt
    query: str
    history: History
    role: str
    ids: list[int]
    input_ids: Tensor
    arguments: dict[str, Any]

    def answer(self, text: str) -> tuple[Response, History]:
        return self.prompt.reply(text, self.query, self.history, self.role)


def chat(
    model: Any,
    tokenizer: Any,
    query: str,
    history: History | None = None,
    *,
    role: str = "user",
    max_length: int | None = None,
    num_beams: int = 1,
    do_sample: bool = True,
    top_p: float | None = None,
    temperature: float | None = None,
    logits_processor: Sequence[Any] | None = None,
    truncate: bool = False,
    encode_special_tokens: bool = False,
    **kwargs: Any,
) -> tuple[Response, History]:
    """Answer `query`, as THUDM's ``model.chat``.

    Args:
        model: a model of this package, or any with `generate`.
        tokenizer: the one of `load_tokenizer`, or of THUDM's make.
        query: what is said now.
        history: what was said before: (query, answer) pairs for ChatGLM-6B and 2, messages for ChatGLM3 and GLM-4.
            A system message may have `tools`.
        role: who says it. With ChatGLM3 and GLM-4, ``observation`` hands back what a tool returned.
        max_length: tokens of prompt and answer together; by default the published value (see `Prompt.sampling`).
            Never more than the context of the model.
        num_beams: beams to search with.
        do_sample: sample; False takes the likeliest token each time.
        top_p: see `Sampling`; the published value by default.
        temperature: see `Sampling`; the published value by default. 0 is do_sample=False.
        logits_processor: further logits processors.
        truncate: when the prompt is too long, leave out the oldest part of the history instead of refusing. What
            is returned still has all of it.
        encode_special_tokens: see `glmquant.prompts.Prompt`.
        kwargs: for `generate`, such as max_new_tokens; an eos_token_id takes the place of the generation's.

    Returns:
        The response and the history with it. The response is text, or for a tool call a dictionary with the
        tool's name and its `parameters` (or `content`, where that is not a call with literal arguments).

    Raises:
        UsageError: a history of the wrong form, a prompt longer than the context, a tokenizer of another model, an
            option that makes no sense.
    """
    request = _request(
        model, tokenizer, query, history, role, max_length, do_sample, top_p, temperature, logits_processor,
        truncate, encode_special_tokens, {"num_beams": num_beams, **kwargs},
    )  # fmt: skip
    output = model.generate(request.input_ids, **request.arguments)
    sequence: list[int] = getattr(output, "sequences", output)[0].tolist()
    transcript = Transcript(request.prompt.decode)
    transcript.ids = _without_stop(sequence[len(request.ids) :], request)
    return request.answer(transcript.whole())


def stream_chat(
    model: Any,
    tokenizer: Any,
    query: str,
    history: History | None = None,
    *,
    role: str = "user",
    past_key_values: ChatCache | None = None,
    max_length: int | None = None,
    do_sample: bool = True,
    top_p: float | None = None,
    temperature: float | None = None,
    logits_processor: Sequence[Any] | None = None,
    return_past_key_values: bool = False,
    truncate: bool = False,
    encode_special_tokens: bool = False,
    **kwargs: Any,
) -> Iterator[tuple[Any, ...]]:
    """Answer `query` while it is generated, as THUDM's ``model.stream_chat``.

    Leaving the loop, or closing the iterator, stops generation.

    Args:
        model: as for `chat`, like all that is not listed here.
        tokenizer: the model's.
        query: what is said now.
        history: what was said before.
        role: who says it.
        past_key_values: what an earlier call returned; what the new prompt begins with alike is not computed again.
            The answer is the same with and without. Not for ChatGLM-6B, whose prompt tokens see each other.
        max_length: tokens of prompt and answer together.
        do_sample: sample.
        top_p: see `Sampling`.
        temperature: see `Sampling`.
        logits_processor: further logits processors.
        return_past_key_values: yield the cache for a later call as well.
        truncate: leave out the oldest part of the history where needed.
        encode_special_tokens: see `glmquant.prompts.Prompt`.
        kwargs: for `generate`.

    Yields:
        (response, history), or (response, history, past_key_values): the whole response so far, whenever there is
        more of it. It never ends inside a character. A tool call is complete in the last one only.

    Raises:
        UsageError: as for `chat`; at the call, not at the first step.
    """
    for name in ("streamer", "num_beams"):
        if kwargs.get(name) not in (None, 1):
            raise UsageError(f"stream_chat cannot take {name}; use chat for that.")
    request = _request(
        model, tokenizer, query, history, role, max_length, do_sample, top_p, temperature, logits_processor,
        truncate, encode_special_tokens, kwargs,
    )  # fmt: skip
    cache = None
    if return_past_key_values or past_key_values is not None:
        if request.prompt.kind == "chatglm":
            raise UsageError(
                "ChatGLM-6B cannot reuse past_key_values: the tokens of its prompt see each other, so a longer prompt "
                "changes them all."
            )
        if past_key_values is not None and not isinstance(past_key_values, ChatCache):
            raise UsageError(
                "past_key_values must be what stream_chat(..., return_past_key_values=True) returned, not "
                f"{type(past_key_values).__name__}."
            )
        cache = past_key_values if past_key_values is not None else ChatCache(model.config)
    return _stream(model, request, cache, return_past_key_values)


def _stream(
    model: Any, request: _Request, cache: ChatCache | None, return_cache: bool
) -> Iterator[tuple[Any, ...]]:
    arguments = request.arguments
    if cache is not None:
        cache.rewind(request.ids)
        arguments = {**arguments, "past_key_values": cache}
    transcript = Transcript(request.prompt.decode)
    seen: list[int] = []
    stops = set(request.arguments["eos_token_id"])
    shown = None
    tokens = generate_tokens(model, request.input_ids, **arguments)
    try:
        for row in tokens:
            seen.append(row)
            if row not in stops and transcript.add(row):
                shown = transcript.text
                yield _result(request, shown, cache, return_cache)
    except Exception:
        if cache is not None:
            cache.reset()  # some layers may have seen more than others
        raise
    finally:
        tokens.close()
        if cache is not None:
            cache.record([*request.ids, *seen])
    whole = transcript.whole()
    if whole != shown:
        yield _result(request, whole, cache, return_cache)


def _result(request: _Request, text: str, cache: ChatCache | None, return_cache: bool) -> tuple[Any, ...]:
    answer = request.answer(text)
    return (*answer, cache) if return_cache else answer


def _request(
    model: Any,
    tokenizer: Any,
    query: str,
    history: History | None,
    role: str,
    max_length: int | None,
    do_sample: bool,
    top_p: float | None,
    temperature: float | None,
    logits_processor: Sequence[Any] | None,
    truncate: bool,
    encode_special_tokens: bool,
    kwargs: dict[str, Any],
) -> _Request:
    prompt = prompt_for(tokenizer, encode_special_tokens=encode_special_tokens)
    checked = prompt.history(history)
    new_tokens, stops = kwargs.pop("max_new_tokens", None), kwargs.pop("eos_token_id", None)
    _check_options(max_length, new_tokens, top_p, temperature, stops)
    do_sample = do_sample and temperature != 0
    limit = min(prompt.sampling.max_length if max_length is None else max_length, _context(model))
    room = limit // _ROOM if new_tokens is None else new_tokens
    ids = _fit(prompt, query, checked, role, limit, room if truncate else None)
    _check_rows(model, ids)
    sampling = {
        "top_p": prompt.sampling.top_p if top_p is None else top_p,
        "temperature": prompt.sampling.temperature if temperature is None else temperature,
    }
    processors = [InvalidScoreLogitsProcessor(prompt.fallback), *(logits_processor or ())]
    # With weights offloaded to disk there is no device to see; transformers moves the ids where they are needed.
    input_ids = torch.tensor([ids], device="cpu" if model.device.type == "meta" else model.device)
    arguments = {
        "attention_mask": torch.ones_like(input_ids),
        # The folder's generation_config.json may have a max_length; the two together make transformers warn.
        "max_length": None,
        "max_new_tokens": limit - len(ids) if new_tokens is None else min(new_tokens, limit - len(ids)),
        "do_sample": do_sample,
        **(sampling if do_sample else dict.fromkeys(sampling)),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": stop_ids(prompt, model) if stops is None else _listed(stops),
        "logits_processor": LogitsProcessorList(processors),
        **kwargs,
    }
    return _Request(prompt, query, checked, role, ids, input_ids, arguments)


def _fit(prompt: Prompt, query: str, history: History, role: str, limit: int, room: int | None) -> list[int]:
    """The ids of the prompt; with `room`, of as much of the history as leaves so many tokens free."""
    ids = prompt.ids(query, history, role)
    while room is not None and len(ids) + room > limit:
        shorter = prompt.shorten(history)
        if shorter is None:
            break
        history, ids = shorter, prompt.ids(query, shorter, role)
    if len(ids) >= limit:
        advice = "shorten the query" if room is not None else "shorten it, or pass truncate=True"
        raise UsageError(
            f"the prompt has {len(ids)} tokens, and {limit} is the limit for prompt and answer together (max_length, "
            f"or the context of the model); {advice}."
        )
    return ids


def _check_options(
    max_length: object, max_new_tokens: object, top_p: object, temperature: object, eos_token_id: object
) -> None:
    """Refuse what is neither None nor a value that makes sense."""

    def whole(value: object, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    def number(value: object, high: float) -> bool:
        return isinstance(value, (int, float)) and 0 <= value <= high

    stops = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    for name, value, fits, form in (
        ("max_length", max_length, whole(max_length, 1), "a whole number from 1 on"),
        ("max_new_tokens", max_new_tokens, whole(max_new_tokens, 1), "a whole number from 1 on"),
        ("top_p", top_p, number(top_p, 1), "a number from 0 to 1"),
        ("temperature", temperature, number(temperature, sys.float_info.max), "a number from 0 on"),
        ("eos_token_id", eos_token_id, all(whole(stop, 0) for stop in stops), "an id or a list of ids"),
    ):
        if value is not None and not fits:
            raise UsageError(f"{name} must be {form}, not {value!r:.60}.")


def stop_ids(prompt: Prompt, model: Any) -> list[int]:
    """Ids that end an answer: those of the format, and for a template, which tells none, the model's own too."""
    ids = prompt.stop_ids()
    if prompt.kind == "template":
        ids += _listed(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return list(dict.fromkeys(ids))


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or ())


def _context(model: Any) -> int:
    for name in ("max_sequence_length", "seq_length", "max_position_embeddings"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return 2**31


def _check_rows(model: Any, ids: list[int]) -> None:
    rows = getattr(model.config, "vocab_size", None)
    if isinstance(rows, int) and max(ids) >= rows:
        raise UsageError(
            f"the tokenizer gives id {max(ids)}, but the model has only {rows} tokens; use the tokenizer of its folder."
        )


def _without_stop(ids: list[int], request: _Request) -> list[int]:
    stops = request.arguments["eos_token_id"]
    for end, row in enumerate(ids):
        if row in stops:
            return ids[:end]
    return ids


class ChatMixin:
    """Gives a model class `chat` and `stream_chat`; the model is their first argument."""

    chat = chat
    stream_chat = stream_chat
