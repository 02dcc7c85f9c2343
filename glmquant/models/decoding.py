"""`generate` at the speed of the memory: `DecodingMixin`.

transformers prepares a request, computes its prompt, and has the say on what comes of logits: processors, sampling,
stopping, streamers. In between, where a request is an ordinary one, logits come from a `DecodeStep`. Everything else
goes the way of transformers; `why_not` says what that is.
"""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..memory_cache import ROOM
from ..ops import decoding_native
from . import step
from .step import DecodeStep

DEVICES = {"cuda", "cpu"}
"""Where a `DecodeStep` is known to be of use; on a CPU, where there are compiled kernels."""

_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_steps: WeakKeyDictionary[Any, tuple[DecodeStep, tuple[int, ...]]] = WeakKeyDictionary()
_busy: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


class DecodingMixin:
    """Mixin for transformers models that generate."""

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls for one beam, greedy or sampling."""
        busy = _busy.setdefault(self, threading.Lock())
        objection = why_not(self, input_ids, generation_config, model_kwargs)
        if synced_gpus or objection is not None or not busy.acquire(blocking=False):
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus,
                streamer=streamer, **model_kwargs,
            )  # fmt: skip
        try:
            run = _step_for(self, input_ids, generation_config.max_length)
            cache = model_kwargs["past_key_values"]
            cache.layers = run.prompt_layers(input_ids.shape[1])
            outputs = self._prefill(input_ids, generation_config, model_kwargs)  # type: ignore[attr-defined]
            cache.layers = []
            mask = model_kwargs.get("attention_mask")
            run.start(input_ids.shape[1], mask, generation_config.max_length)
            logits = outputs.logits[:, -1]
            del outputs
            try:
                return _generate(
                    run, logits, input_ids, logits_processor, stopping_criteria, generation_config, streamer
                )
            finally:
                run.end()
        finally:
            busy.release()


def why_not(model: Any, input_ids: Tensor, config: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a request goes the way of transformers, as the end of a sentence; None if it does not.

    Args:
        model: what generates.
        input_ids: int64 [rows, columns].
        config: the GenerationConfig.
        kwargs: what transformers would give to the model beside `input_ids`.
    """
    cache: Any = kwargs.get("past_key_values")
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if model.device.type not in DEVICES:
        return f"the model is on {model.device.type}"
    if model.device.type == "cpu" and (reason := decoding_native.why_not()):
        return reason
    if input_ids.device != model.device:
        return f"the ids are on {input_ids.device}"
    if reason := step.why_not(model):
        return reason
    if unknown := [name for name in kwargs.keys() - _KNOWN if kwargs[name] is not None]:
        return f"it has {', '.join(sorted(unknown))}"
    if type(cache) is not DynamicCache or cache.get_seq_length() or getattr(cache, "_is_user_defined", False):
        return "it brings a cache of its own"
    if config.cache_implementation is not None or config.prefill_chunk_size is not None:
        return "it chooses a cache, or chunks"
    if config.return_dict_in_generate or getattr(config, "is_assistant", False):
        return "it asks for more than tokens"
    real = torch.full((), input_ids.shape[1], device=input_ids.device) if mask is None else mask.sum(-1)
    if mask is not None and (mask.dim() != 2 or not bool((mask[:, 1:] >= mask[:, :-1]).all())):
        return "its padding is not on the left"
    if positions is None or not bool((positions[:, -1] == real - 1).all()):
        return "it has positions of its own"
    return None


def cache_bytes(model: Any) -> int:
    """Bytes of the cache that `generate` keeps for the next request like the last; 0 if it went another way."""
    found = _steps.get(model)
    return 0 if found is None else found[0].cache_bytes


def _step_for(model: Any, input_ids: Tensor, max_length: int) -> DecodeStep:
    """The one that the model used last, if it fits: graphs hold addresses, of weights too."""
    rows, columns = input_ids.shape
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    found = _steps.get(model)
    if found is None or found[0].rows != rows or found[1] != addresses:
        _steps.pop(model, None)  # before there is another cache
        found = DecodeStep(model, rows, min(max_length, columns + ROOM)), addresses
        _steps[model] = found
    return found[0]


def _generate(
    run: DecodeStep,
    logits: Tensor,
    ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
) -> Tensor:
    """Transformers' ``_sample``, but that a GPU never waits for the host to look at a token.

    Whether all sequences have ended is read when the next token is on its way already; if so, that one is dropped.
    """
    padding, ends = config._pad_token_tensor, any(hasattr(c, "eos_token_id") for c in criteria)
    unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
    before: _Report | None = None
    while True:
        scores = processors(ids, logits.to(copy=True, dtype=torch.float32))
        if config.do_sample:
            tokens = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(scores, dim=-1)
        if ends:
            tokens = tokens * unfinished + padding * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~criteria(ids, None)
        report = _Report(unfinished, tokens if streamer is not None else None)
        if before is not None and before.read(streamer):
            ids = ids[:, :-1]
            break
        before = report
        if not ids.is_cuda or ids.shape[1] >= config.max_length:
            if report.read(streamer):
                break
            before = None
        logits = run(tokens)
    if streamer is not None:
        streamer.end()
    return ids


class _Report:
    """What the host wants to know of a token, on its way there.

    Args:
        unfinished: [rows], 1 for sequences that go on.
        tokens: [rows] for a streamer, or None.
    """

    def __init__(self, unfinished: Tensor, tokens: Tensor | None) -> None:
        self._event = torch.cuda.Event() if unfinished.is_cuda else None  # type: ignore[no-untyped-call]
        self._running, self._tokens = _sent(unfinished.max()), None if tokens is None else _sent(tokens)
        if self._event is not None:
            self._event.record()

    def read(self, streamer: Any) -> bool:
        """Hand the tokens on; whether all sequences have ended."""
        if self._event is not None:
            self._event.synchronize()
        if self._tokens is not None:
            streamer.put(self._tokens)
        return not int(self._running)


def _sent(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    there = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
