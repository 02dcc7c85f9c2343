"""q, k and v in one product: the same model under the same names, whatever happens to it afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_formats import write_chatglm2

import glmquant
from glmquant import Recipe
from glmquant.models.fused import fuse

IDS = torch.tensor([[5, 9, 200, 31, 77, 3]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "random"
    write_chatglm2(folder)
    return folder


@pytest.fixture(params=[None, 4, 8], ids=["16-bit", "int4", "int8"])
def folder(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Path:
    if request.param is None:
        return source
    glmquant.convert(
        source, tmp_path / "out", Recipe(bits=request.param, group_size=32, symmetric=request.param == 8)
    )
    return tmp_path / "out"


def load(folder: Path, dtype: str = "float32") -> Any:
    return glmquant.load(folder, "cpu", dtype)


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def separate(model: Any) -> Any:
    """The same model as transformers has it."""
    plain = copy.deepcopy(model)
    for attention in attentions(plain):
        attention.__class__ = type(attention).__mro__[2]
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = getattr(attention, name)
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()
    return plain


def joint(model: Any) -> bool:
    """Whether attentions compute q, k and v at once."""
    with torch.no_grad():
        return all(attention.joint() is not None for attention in attentions(model))


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS, **options).logits
    return found


def test_the_same_logits_and_tokens(folder: Path) -> None:
    model = load(folder)
    plain = separate(model)
    assert joint(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(
        logits(model, attention_mask=mask)[:, 2:],
        logits(plain, attention_mask=mask)[:, 2:],
        rtol=1e-5,
        atol=1e-5,
    )
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for batch in (IDS, IDS.repeat(3, 1).roll(1, 1)):
        assert torch.equal(model.generate(batch, **options), plain.generate(batch, **options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_16_bit_too(folder: Path, dtype: str) -> None:
    model = load(folder, dtype)
    plain = separate(model)
    assert joint(model)
    found, wanted = logits(model).float(), logits(plain).float()
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_names_values_and_memory_stay(folder: Path) -> None:
    model = load(folder)
    plain = separate(model)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name])

    def nbytes(of: Any) -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in of.parameters()}
        return sum(storages.values())

    assert nbytes(model) == nbytes(plain)


def test_again_is_harmless(folder: Path) -> None:
    model = load(folder)
    before = [p.data_ptr() for p in model.parameters()]
    fuse(model)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_another_dtype_moves_them_together_again(source: Path) -> None:
    model = load(source)
    assert joint(model)
    model.bfloat16()
    assert joint(model)
    torch.testing.assert_close(logits(model), logits(separate(model)), rtol=3e-2, atol=3e-2)


def test_quantizing_in_place(source: Path) -> None:
    model = load(source)
    logits(model)
    model.quantize(8, group_size=32)
    assert joint(model)
    torch.testing.assert_close(logits(model), logits(separate(model)), rtol=1e-5, atol=1e-5)


def test_new_values_are_used(folder: Path) -> None:
    model = load(folder)
    before = logits(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name and parameter.is_floating_point():
                parameter.mul_(2)
    assert joint(model)
    changed = logits(model)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(changed, logits(separate(model)), rtol=1e-5, atol=1e-5)
    model.load_state_dict(state)
    assert torch.equal(logits(model), before)
    model.load_state_dict(state, assign=True)  # other memory
    assert not joint(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_hooks_are_called(folder: Path) -> None:
    model = load(folder)
    seen: list[int] = []
    handle = attentions(model)[0].k_proj.register_forward_hook(lambda *call: seen.append(1))
    logits(model)
    assert seen == [1]
    handle.remove()
    assert joint(model)


def test_a_layer_in_another_scheme_is_left_alone(source: Path) -> None:
    model = load(source).quantize(8, group_size=32)
    other = load(source).quantize(4, group_size=32)
    for ours, theirs in zip(attentions(model), attentions(other), strict=True):
        ours.v_proj = theirs.v_proj
    wanted = logits(model)
    fuse(model)
    assert not joint(model)
    assert torch.equal(logits(model), wanted)


def test_gradients_take_the_plain_way(source: Path) -> None:
    model = load(source)
    model(IDS, labels=IDS).loss.backward()
    assert all(a.k_proj.weight.grad.abs().sum() > 0 for a in attentions(model))


def test_a_16_bit_model_is_saved_and_loads_again(source: Path, tmp_path: Path) -> None:
    model = load(source)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
