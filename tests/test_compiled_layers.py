"""The layers of a decoded token in one call: to the bit what the calls one by one give, or not used at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_convert import small_source
from helpers_models import LATER, golden
from torch import Tensor, nn

import glmquant
from glmquant import Recipe
from glmquant.models import decoding, step
from glmquant.models.compiled import compiled_layers
from glmquant.ops import decoding_native
from glmquant.ops.layers_native import CompiledLayers
from glmquant.serve import runners
from glmquant.serve.runners import Piece, SlotRunner

pytestmark = pytest.mark.skipif(
    decoding_native.why_not() is not None, reason=f"no compiled kernels: {decoding_native.why_not()}"
)
RECIPES = {
    "int4": Recipe(group_size=32),
    "int4-asymmetric": Recipe(group_size=64, symmetric=False),
    "int8": Recipe(bits=8, group_size="row"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    source = small_source(root / "source")
    for name, recipe in RECIPES.items():
        glmquant.convert(source, root / name, recipe)
    return {name: root / name for name in RECIPES}


class Watched:
    """Logits of every step, and whether the layers were one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[Tensor] = []
        self.calls = 0
        decode, call = step.decode, CompiledLayers.__call__

        def watched(*args: Any) -> Tensor:
            self.logits.append(decode(*args))
            return self.logits[-1]

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(step, "decode", watched)
        monkeypatch.setattr(CompiledLayers, "__call__", counted)

    def take(self) -> tuple[list[Tensor], int]:
        taken, self.logits, self.calls = (self.logits, self.calls), [], 0
        return taken


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step, runners):
        monkeypatch.setattr(module, "compiled_layers", lambda *args: None)


def answer(model: Any, rows: int, new: int = 6) -> Tensor:
    ids = torch.randint(5, 320, (rows, 9), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[: rows - 1, :3] = 0
    options = {"do_sample": False, "max_length": None, "max_new_tokens": new, "eos_token_id": None}
    found: Tensor = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    decoding._steps.clear()
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", RECIPES)
def test_to_the_bit(
    folders: dict[str, Path], kind: str, dtype: str, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = glmquant.load(folders[kind], device="cpu", dtype=dtype)
    rows = (1, 3, 9)
    found = [answer(model, n) for n in rows]
    logits, calls = watched.take()
    assert calls == len(logits) == 5 * len(rows)
    without(monkeypatch)
    assert all(torch.equal(answer(model, n), tokens) for n, tokens in zip(rows, found, strict=True))
    expected, calls = watched.take()
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


@pytest.mark.parametrize("name", LATER)
def test_every_family(name: str, watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    model = glmquant.load(golden(name, "model.safetensors"), device="cpu", dtype="float32").quantize(
        4, group_size=32
    )
    found, logits = answer(model, 2), watched.logits
    assert watched.take()[1] == 5
    without(monkeypatch)
    assert torch.equal(answer(model, 2), found)
    assert all(torch.equal(a, b) for a, b in zip(logits, watched.logits, strict=True))


def test_layers_of_different_bits(
    folders: dict[str, Path], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (glmquant.load(folders[name], device="cpu") for name in ("int4", "int8"))
    model.model.layers[1] = other.model.layers[1]
    found = answer(model, 2)
    assert watched.take()[1] == 5
    without(monkeypatch)
    assert torch.equal(answer(model, 2), found)


def test_a_cache_that_grows(
    folders: dict[str, Path], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = glmquant.load(folders["int4"], device="cpu", dtype="float32")
    monkeypatch.setattr(step, "capacity_for", lambda columns: 12)
    monkeypatch.setattr(step, "grown", lambda capacity, longest: capacity + 5)
    found = answer(model, 2, 20)
    assert watched.take()[1] == 19
    without(monkeypatch)
    assert torch.equal(answer(model, 2, 20), found)


def test_requests_in_slots(
    folders: dict[str, Path], watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = glmquant.load(folders["int4"], device="cpu", dtype="float32")
    prompts = {4: [9, 8, 7, 6], 0: [5], 2: list(range(30, 90))}

    def run() -> Tensor:
        runner = SlotRunner(model, 5, 100, 64)
        logits = [runner.step([Piece(slot, ids, 0)]) for slot, ids in prompts.items()]
        for extra in range(4):
            pieces = [Piece(slot, [11 + slot], len(ids) + extra) for slot, ids in prompts.items()]
            logits.append(runner.step(pieces))
        return torch.cat(logits)

    found = run()
    assert watched.take()[1] == 5  # a prompt of one token is one, too
    without(monkeypatch)
    assert torch.equal(run(), found)
    assert watched.take()[1] == 0


def test_what_is_left_one_by_one(folders: dict[str, Path]) -> None:
    def compiled(model: Any) -> CompiledLayers | None:
        config = model.config
        shape = (2, config.num_key_value_heads, 16, config.head_dim)
        caches = [torch.zeros(shape, dtype=model.dtype) for _ in model.model.layers]
        return compiled_layers(model, caches, [c.clone() for c in caches])

    plain = glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="float32")
    assert compiled(plain) is None
    model = glmquant.load(folders["int4"], device="cpu", dtype="float32")
    layers = compiled(model)
    assert layers is not None
    assert layers.objection(1) is None
    linear = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = nn.Sequential(linear)  # as an adapter wraps it
    assert compiled(model) is None
    model.model.layers[1].mlp.down_proj = linear
    attention = model.model.layers[0].self_attn
    attention.k_proj = type(attention.k_proj).from_quantized(attention.k_proj.quantized_tensor())
    assert compiled(model) is None  # no longer next to q and v


def test_groups_that_the_kernels_do_not_know(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = glmquant.load(golden("chatglm3-6b/tiny", "model.safetensors"), device="cpu", dtype="bfloat16")
    model.quantize(4, group_size=32)
    caches = [torch.zeros(1, 2, 16, 16, dtype=model.dtype) for _ in model.model.layers]
    monkeypatch.setattr("glmquant._native.AMX_ROWS", 4)
    monkeypatch.setattr("glmquant._native.has_amx", lambda: True)
    layers = compiled_layers(model, caches, caches)
    assert layers is not None
    assert layers.objection(4) is None
    assert "5 rows" in str(layers.objection(5))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_does_not_depend_on_who_else_is_answered(folders: dict[str, Path], dtype: str) -> None:
    """To the bit, up to sixteen; prompts are read one by one here."""
    model = glmquant.load(folders["int4"], device="cpu", dtype=dtype)
    prompts = [[5 + slot] * (slot + 1) for slot in range(16)]
    runner = SlotRunner(model, 16, 64, 16)

    def answers(slots: list[int]) -> dict[int, list[Tensor]]:
        last = {slot: runner.step([Piece(slot, prompts[slot], 0)])[0] for slot in slots}
        found: dict[int, list[Tensor]] = {slot: [] for slot in slots}
        for extra in range(5):
            pieces = [Piece(s, [int(last[s].argmax())], len(prompts[s]) + extra) for s in slots]
            for slot, logits in zip(slots, runner.step(pieces), strict=True):
                found[slot].append(logits)
                last[slot] = logits
        return found

    together = answers(list(range(16)))
    for slot in (0, 7, 15):
        for a, b in zip(answers([slot])[slot], together[slot], strict=True):
            assert torch.equal(a, b)


def test_a_newcomer_s_prompt_does_not_change_an_answer(folders: dict[str, Path]) -> None:
    model = glmquant.load(folders["int4"], device="cpu", dtype="float16")
    runner = SlotRunner(model, 3, 64, 32)
    for slot in (0, 2):
        runner.step([Piece(slot, [7, 8, 9], 0)])
    alone = runner.step([Piece(0, [11], 3)])
    prompt = Piece(1, list(range(40, 70)), 0)
    read = runner.step([prompt])
    mixed = runner.step([Piece(2, [12], 3), prompt, Piece(0, [11], 3)])
    assert torch.equal(mixed[2:], alone)
    assert torch.equal(mixed[1:2], read)
    assert torch.equal(mixed[:1], runner.step([Piece(2, [12], 3)]))
