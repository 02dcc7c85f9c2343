"""The decode loop: the tokens of transformers, whatever is asked; and its kernels against plain PyTorch."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers_models import LATER, golden
from helpers_triton import interpreted, needs_interpreter  # noqa: F401
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import glmquant
from glmquant.bench.cases import Workload
from glmquant.bench.worker import _Generating
from glmquant.models import decoding, step
from glmquant.models.step import DecodeStep
from glmquant.ops import decoding as ops

EOS = list(range(5, 320, 7))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Where a model decodes with a `DecodeStep`, on this CPU too; how often each was called."""
    calls: list[int] = []
    usual = DecodeStep.__call__

    def counted(self: DecodeStep, tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return usual(self, tokens)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    monkeypatch.setattr(decoding, "DEVICES", {"cpu"})
    yield calls
    decoding._steps.clear()


@pytest.fixture(scope="module")
def model() -> Any:
    return glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="float32")


def prompts(model: Any, rows: int) -> dict[str, Tensor]:
    """Of different lengths, with padding on the left."""
    ids = torch.randint(5, 320, (rows, 9), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 2 * row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both_ways(model: Any, steps: list[int], used: bool = True, **options: Any) -> Any:
    """Generate with the loop and without it: the same tokens. `used`: whether the loop is what does it."""
    found = []
    for device in ("cpu", "cuda"):
        decoding.DEVICES.clear()
        decoding.DEVICES.add(device)
        steps.clear()
        torch.manual_seed(7)
        found.append(
            model.generate(**{"max_length": None, "pad_token_id": 0, "eos_token_id": None, **options})
        )
        assert bool(steps) == (used and device == "cpu")
    decoding.DEVICES.clear()
    decoding.DEVICES.add("cpu")
    assert torch.equal(found[0], found[1])
    return found[0]


GREEDY = {"do_sample": False, "top_p": None, "temperature": None}
SAMPLED = {"do_sample": True, "top_p": 0.9, "temperature": 1.4, "top_k": 30, "repetition_penalty": 1.1}


def test_benchmarks_measure_it(model: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # put back afterwards
    measured = _Generating(model)
    measured.run(Workload(prompt=9, new=4), 2)
    assert len(steps) == 3
    config = model.config
    columns = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    assert measured.cache_bytes == 2 * columns * 256 * model.dtype.itemsize


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_tokens(model: Any, steps: list[int], rows: int, how: dict[str, Any]) -> None:
    both_ways(model, steps, **prompts(model, rows), **how, max_new_tokens=20)


@pytest.mark.parametrize("name", LATER)
def test_the_same_tokens_in_every_family(name: str, steps: list[int]) -> None:
    folder = golden(name, "model.safetensors")
    model = glmquant.load(folder, device="cpu", dtype="float32")
    both_ways(model, steps, **prompts(model, 2), **GREEDY, max_new_tokens=12)
    model.quantize(4, group_size=32)
    both_ways(model, steps, **prompts(model, 2), **GREEDY, max_new_tokens=12)


@pytest.mark.parametrize("rows", [1, 3])
def test_ends_are_respected(model: Any, steps: list[int], rows: int) -> None:
    """Several stop ids, at different times in a batch: rows that have ended are filled with padding."""
    found = both_ways(model, steps, **prompts(model, rows), **SAMPLED, max_new_tokens=60, eos_token_id=EOS)
    assert found.shape[1] < 69
    assert bool(torch.isin(found[:, 9:], torch.tensor(EOS)).any(1).all())


def test_lengths_are_respected(model: Any, steps: list[int]) -> None:
    ids = {**prompts(model, 2), **GREEDY}
    assert both_ways(model, steps, **ids, max_new_tokens=7).shape[1] == 16
    assert both_ways(model, steps, **{**ids, "max_length": 14}).shape[1] == 14
    both_ways(model, steps, **ids, max_new_tokens=30, min_new_tokens=25, eos_token_id=EOS)
    assert both_ways(model, steps, used=False, **ids, max_new_tokens=1).shape[1] == 10  # the prompt gives it


class Received(BaseStreamer):
    def __init__(self) -> None:
        self.rows: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.rows += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamers_get_every_token_once(model: Any, steps: list[int]) -> None:
    for options in ({"max_new_tokens": 9}, {"max_new_tokens": 60, "eos_token_id": EOS}):
        streamer = Received()
        found = model.generate(
            **{**prompts(model, 1), **GREEDY, "max_length": None, "pad_token_id": 0, **options},
            streamer=streamer,
        )
        assert steps
        assert streamer.rows == found[0].tolist()
        assert streamer.ended


class After(StoppingCriteria):
    """Stops after some tokens, counting its own calls."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.left -= 1
        return torch.full((input_ids.shape[0],), self.left <= 0)


def test_stopping_criteria_are_asked(model: Any, steps: list[int]) -> None:
    found = model.generate(
        **prompts(model, 2), **GREEDY, max_length=None, max_new_tokens=30, stopping_criteria=[After(5)]
    )
    assert found.shape[1] == 14
    assert len(steps) == 4


def test_a_cache_that_grows(model: Any, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmquant.memory_cache._UNIT", 4)
    monkeypatch.setattr(decoding, "ROOM", 2)
    both_ways(model, steps, **prompts(model, 2), **GREEDY, max_new_tokens=40)
    assert decoding._steps[model][0].capacity == 48
    both_ways(
        model, steps, **prompts(model, 2), **GREEDY, max_new_tokens=10
    )  # in a cache with something left in it


def test_what_goes_the_way_of_transformers(model: Any, steps: list[int]) -> None:
    ids = {**prompts(model, 2), **GREEDY, "max_new_tokens": 4}
    for options in (
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"attention_mask": torch.tensor([[1] * 8 + [0], [1] * 9])},
        {"position_ids": torch.arange(9).repeat(2, 1) + 3},
    ):
        both_ways(model, steps, used=False, **{**ids, **options})
    whole = model.generate(**ids, max_length=None, return_dict_in_generate=True, output_scores=True)
    assert not steps
    assert len(whole.scores) == 4
    steps.clear()
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    both_ways(model, steps, used=False, **ids)
    hook.remove()
    both_ways(model, steps, **ids)


def test_models_it_is_not_for() -> None:
    first = glmquant.load(golden("chatglm-6b/tiny-3l", "model.safetensors"), device="cpu", dtype="float32")
    assert "it is for ChatGLM2" in str(step.why_not(first))
    model = glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="float32")
    assert step.why_not(model) is None
    assert "training" in str(step.why_not(model.train()))


def test_norms_of_another_dtype_are_left_to_transformers() -> None:
    """Whatever it makes of them: the kernels would read them as what the rest is."""
    model = glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="bfloat16")
    model.quantize(4, group_size=32)
    assert step.why_not(model) is None  # scales and packed weights are no others
    model.model.layers[1].input_layernorm.float()
    assert step.why_not(model) == "its parameters are of several dtypes"


def test_weights_that_change_are_seen(steps: list[int]) -> None:
    model = glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="float32")
    ids = {**prompts(model, 1), **GREEDY, "max_new_tokens": 12}
    both_ways(model, steps, **ids)
    first = decoding._steps[model][0]
    both_ways(model, steps, **ids)
    assert decoding._steps[model][0] is first
    model.quantize(8, group_size=32)
    both_ways(model, steps, **ids)
    assert decoding._steps[model][0] is not first
    del model, first
    gc.collect()
    assert not decoding._steps


def test_two_threads(model: Any, steps: list[int]) -> None:
    """One of them has the step, the other does without."""
    ids = {**prompts(model, 1), **GREEDY, "max_length": None, "max_new_tokens": 25, "pad_token_id": 0}
    expected, found = model.generate(**ids), []
    threads = [threading.Thread(target=lambda: found.append(model.generate(**ids))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(torch.equal(tokens, expected) for tokens in found)


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture
def kernels_and_torch(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> Any:  # noqa: F811
    """Compute something with the kernels, then without."""

    def run(compute: Any) -> tuple[Any, Any]:
        monkeypatch.setattr(ops, "chosen", lambda device: ops.By.TRITON)
        with_kernels = compute()
        monkeypatch.setattr(ops, "chosen", lambda device: ops.By.TORCH)
        return with_kernels, compute()

    return run


@needs_interpreter
@pytest.mark.parametrize("columns", [96, 128])
def test_norm(kernels_and_torch: Any, columns: int) -> None:
    def compute() -> tuple[Tensor, Tensor]:
        x = random(3, columns)
        return ops.rms_norm(x, random(columns), 1e-5, random(3, columns) * 2), x

    found, expected = kernels_and_torch(compute)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-3, atol=1e-4)
    assert torch.equal(found[1], expected[1])
    found, expected = kernels_and_torch(lambda: ops.rms_norm(random(2, columns), random(columns), 1e-5))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


@needs_interpreter
def test_silu(kernels_and_torch: Any) -> None:
    found, expected = kernels_and_torch(lambda: ops.silu_product(random(3, 2 * 1100) * 4))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "groups", "width", "rotary"), [(4, 2, 32, 16), (3, 1, 16, 16), (4, 4, 8, 4)]
)
def test_positions(kernels_and_torch: Any, heads: int, groups: int, width: int, rotary: int) -> None:
    angles = random(2, rotary // 2, dtype=torch.float32) * 3
    cos, sin = (torch.cat((t, t), -1).half() for t in (angles.cos(), angles.sin()))

    def compute() -> tuple[Tensor, ...]:
        keys = torch.zeros(2, groups, 6, width, dtype=torch.float16)
        cache = ops.Cache(keys, keys.clone(), torch.zeros(2, dtype=torch.int64), torch.tensor([4]))
        query = ops.rotate_and_store(random(2, (heads + 2 * groups) * width), cos, sin, heads, cache)
        return query, cache.keys, cache.values

    found, expected = kernels_and_torch(compute)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert bool(found[1][:, :, 4].any())
    assert not bool(found[1][:, :, [0, 1, 2, 3, 5]].any())


@needs_interpreter
@pytest.mark.parametrize("column", [0, 5, 63, 64, 199])
def test_attention(kernels_and_torch: Any, monkeypatch: pytest.MonkeyPatch, column: int) -> None:
    """Few columns and many, for 16 heads to a group and for fewer, with padding; nothing else in the cache is read."""
    monkeypatch.setattr(ops, "PARTS", 4)
    for heads, groups in ((16, 1), (6, 2)):
        keys, values = random(2, groups, 256, 32), random(2, groups, 256, 33)[..., 1:].contiguous()
        for t in (keys, values):
            t[:, :, column + 1 :] = float("nan")
            t[1, :, : column // 2] = float("nan")
        first = torch.tensor([0, column // 2])
        query = random(2, heads, 32)
        cache = ops.Cache(keys, values, first, torch.tensor([column]))
        monkeypatch.setattr(ops, "chosen", lambda device: ops.By.TRITON)
        found = ops.attend(query, cache, 0.2)
        for row in range(2):
            here = slice(int(first[row]), column + 1)
            k, v = (t[row, :, here].repeat_interleave(heads // groups, 0).double() for t in (keys, values))
            weights = torch.softmax(0.2 * (query[row].double()[:, None] @ k.transpose(1, 2)), -1)
            torch.testing.assert_close(found[row].double(), (weights @ v).flatten(), rtol=4e-3, atol=4e-3)
