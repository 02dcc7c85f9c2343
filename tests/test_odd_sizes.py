"""Shapes that leave tensors at odd offsets: every reader must still find them, aligned to their items."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers_formats import QUICK, load_tensors, same_bytes, write_chatglm2
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import glmquant
from glmquant import Recipe
from glmquant.checkpoint.sink import ShardedSink, ShardLayout, StoredTensor
from glmquant.checkpoint.source import ITEM_SIZES, torch_dtype
from glmquant.packing import pack_int32
from glmquant.quantizers import RoundToNearest, Thudm
from glmquant.scheme import Scheme

DTYPES = ["I8", "F16", "BF16", "I32", "F32", "I64"]


def read_with_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def offsets(path: Path) -> dict[str, tuple[str, int]]:
    """dtype and offset in the file of every tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {n: (e["dtype"], 8 + length + e["data_offsets"][0]) for n, e in header.items()}


def random_tensor(stored: StoredTensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (stored.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype(stored.dtype)).view(stored.shape)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[StoredTensor, ...]:
    count = draw(st.integers(1, 8))
    sizes = st.integers(1, 9)
    shapes = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes))
    return tuple(StoredTensor(f"t{n}", draw(st.sampled_from(DTYPES)), draw(shapes)) for n in range(count))


@QUICK
@given(layouts(), st.integers(1, 4))
def test_what_is_written_in_any_order_is_read_right(tensors: tuple[StoredTensor, ...], step: int) -> None:
    values = {t.name: random_tensor(t, seed) for seed, t in enumerate(tensors)}
    with TemporaryDirectory() as name:
        folder = Path(name)
        layout = ShardLayout("model.safetensors", tensors)
        sink = ShardedSink(folder, [layout])
        for tensor in tensors:
            for rows in values[tensor.name].split(step):
                sink.write_rows(tensor.name, rows)
        sink.close()
        path = folder / "model.safetensors"
        assert path.stat().st_size == layout.nbytes
        found = read_with_safetensors(path)
        assert found.keys() == values.keys()
        for key, value in values.items():
            assert same_bytes(found[key], value), key
        for key, (dtype, offset) in offsets(path).items():
            assert offset % ITEM_SIZES[dtype] == 0, key


@pytest.mark.parametrize(
    ("tensors", "order"),
    [
        pytest.param([("a", "I8", 4), ("b", "F16", 3), ("c", "I8", 3)], "abc", id="aligned-as-written"),
        pytest.param([("a", "I8", 3), ("b", "F16", 3), ("c", "I32", 1)], "cba", id="larger-items-first"),
        pytest.param([("a", "F16", 1), ("b", "I32", 1), ("c", "F16", 1)], "bac", id="stable-among-equals"),
    ],
)
def test_writing_order_is_kept_where_it_can_be(tensors: list[tuple[str, str, int]], order: str) -> None:
    layout = ShardLayout("x", tuple(StoredTensor(n, dtype, (size,)) for n, dtype, size in tensors))
    assert "".join(t.name for t in layout.in_file_order()) == order


ODD = {
    "hidden_size": 65,
    "ffn_hidden_size": 137,
    "kv_channels": 20,
    "num_attention_heads": 3,
    "multi_query_group_num": 1,
    "padded_vocab_size": 321,
}


@pytest.mark.parametrize("shard_size", [10**9, 30_000], ids=["one-file", "shards"])
def test_odd_models_in_cpm(tmp_path: Path, shard_size: int) -> None:
    tensors = write_chatglm2(tmp_path / "source", **ODD)
    out = tmp_path / "out"
    glmquant.convert(tmp_path / "source", out, Recipe(bits=8, format="cpm", max_shard_size=shard_size))
    found = load_tensors(out)
    for name, weight in tensors.items():
        if "encoder.layers" in name and weight.dim() == 2:
            quantized = Thudm()(weight, Scheme(8))
            assert torch.equal(found.pop(name), quantized.codes)
            assert torch.equal(found.pop(name + "_scale"), quantized.scale.squeeze(1))
        else:
            assert same_bytes(found.pop(name), weight), name
    assert not found
    for path in out.glob("*.safetensors"):
        assert all(offset % ITEM_SIZES[dtype] == 0 for dtype, offset in offsets(path).values())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("layout", ["native", "original"])
def test_odd_models_in_compressed_tensors(tmp_path: Path, layout: str, symmetric: bool) -> None:
    """Rows that fill no word, zero points of rows that fill no word, and parts that begin inside one."""
    tensors = write_chatglm2(tmp_path / "source", **ODD)
    out = tmp_path / "out"
    recipe = Recipe(group_size="row", symmetric=symmetric, method="rtn", layout=layout)
    glmquant.convert(tmp_path / "source", out, recipe)
    assert glmquant.verify(out, source=tmp_path / "source").ok
    found = load_tensors(out)
    prefix = "transformer.encoder.layers.1."
    weight = tensors[prefix + "self_attention.query_key_value.weight"]
    parts = {prefix + "self_attention.query_key_value": weight}
    if layout == "native":
        names = [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
        parts = dict(zip(names, weight.split([60, 20, 20]), strict=True))
    for name, rows in parts.items():
        expected = RoundToNearest()(rows.contiguous(), Scheme(4, None, symmetric))
        assert torch.equal(found[name + ".weight_packed"], pack_int32(expected.codes, 4))
        assert torch.equal(found[name + ".weight_scale"], expected.scale)
        assert found[name + ".weight_shape"].tolist() == list(rows.shape)
        if expected.zero_point is not None:
            packed = pack_int32(expected.zero_point.t(), 4).t()
            assert torch.equal(found[name + ".weight_zero_point"], packed)
