"""Reading checkpoints: single files and shards, safetensors and .bin, whole tensors and rows."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_sources import (
    CHATGLM,
    CHATGLM2,
    EMBEDDING,
    GOLDEN,
    HEAD,
    QKV,
    Tensors,
    entry,
    random_tensors,
    raw_safetensors,
    write_bin,
    write_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glmquant import Recipe, convert
from glmquant._open import open_source
from glmquant.checkpoint import TensorSource, open_folder, torch_dtype

BINS = ["chatglm-6b/tiny-3l/bin-fp16", "chatglm2-6b/tiny/bin-fp16", "chatglm3-6b/tiny/bin-fp16"]
SHARDED = [*BINS, "glm-4-9b-chat/tiny/safetensors-bf16"]
SINGLE = ["chatglm-6b/tiny-3l", "chatglm3-6b/tiny-int4", "chatglm2-6b/tiny-int8"]


def loaded(folder: Path) -> Tensors:
    """The same folder as other libraries read it."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    for file in sorted(folder.glob("*.bin")):
        tensors.update(torch.load(file, weights_only=True))
    return tensors


def same(source: TensorSource, tensors: Tensors) -> None:
    assert set(source.infos()) == set(tensors)
    for name, tensor in tensors.items():
        info = source.infos()[name]
        assert info.shape == tuple(tensor.shape)
        assert torch_dtype(info.dtype) is tensor.dtype
        assert info.nbytes == tensor.nbytes
        read = source.read(name)
        assert read.dtype is tensor.dtype
        assert read.equal(tensor), name


@pytest.mark.parametrize("model", [*SHARDED, *SINGLE])
def test_tensors_are_what_other_libraries_read(model: str) -> None:
    folder = GOLDEN / model
    source = open_folder(folder)
    same(source, loaded(folder))
    assert source.folder == folder
    assert [file.name for file in source.files] == sorted(
        file.name for suffix in ("bin", "safetensors") for file in folder.glob(f"*.{suffix}")
    )


@pytest.mark.parametrize("model", SHARDED)
def test_a_tensor_is_where_the_index_says(model: str) -> None:
    source = open_folder(GOLDEN / model)
    assert len(source.files) == 3
    for info in source.infos().values():
        file = GOLDEN / model / info.shard
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                assert info.name in shard.keys()  # noqa: SIM118 - not a mapping
        else:
            assert info.name in torch.load(file, weights_only=True)


@pytest.mark.parametrize("model", BINS)
def test_stored_rotary_frequencies_are_listed(model: str) -> None:
    infos = open_folder(GOLDEN / model).infos()
    buffers = [info for name, info in infos.items() if name.endswith("inv_freq")]
    assert buffers
    assert all(info.dtype == "F16" and len(info.shape) == 1 for info in buffers)


def test_bin_shards_hold_what_their_safetensors_twin_holds() -> None:
    twin = open_folder(GOLDEN / "chatglm-6b/tiny-3l")  # the same numbers in float32
    shards = open_folder(GOLDEN / "chatglm-6b/tiny-3l/bin-fp16")
    assert set(twin.infos()) == set(shards.infos())
    for name in twin.infos():
        if not name.endswith("inv_freq"):
            assert shards.read(name).float().equal(twin.read(name)), name


@pytest.mark.parametrize("model", BINS)
def test_bin_and_safetensors_convert_to_the_same_bytes(model: str, tmp_path: Path) -> None:
    tensors = loaded(GOLDEN / model)
    source = open_folder(GOLDEN / model)
    twin = write_model(tmp_path / "twin", source.config, {n: t.clone() for n, t in tensors.items()}, shards=2)
    recipe = Recipe(format="cpm")
    convert(GOLDEN / model, tmp_path / "a", recipe)
    convert(twin, tmp_path / "b", recipe)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["safetensors", "sharded", "bin"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tensors = random_tensors(CHATGLM2)
    if request.param == "bin":
        return write_bin(folder, CHATGLM2, tensors)
    return write_model(folder, CHATGLM2, tensors, shards=3 if request.param == "sharded" else 1)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 0), (0, 1), (5, 9), (95, 96), (90, None), (96, 96), (96, None)]
)
def test_rows(model: Path, start: int, stop: int | None) -> None:
    whole = random_tensors(CHATGLM2)[EMBEDDING]
    assert whole.shape[0] == 96
    assert open_folder(model).read(EMBEDDING, start, stop).equal(whole[start:stop])


def test_a_source_can_be_read_after_release_and_from_many_threads(model: Path) -> None:
    source, tensors = open_folder(model), random_tensors(CHATGLM2)
    wrong: list[str] = []

    def read_all() -> None:
        for name, tensor in tensors.items():
            info = source.infos()[name]
            source.prefetch(info.shard)
            if not source.read(name).equal(tensor):
                wrong.append(name)
            source.release(info.shard)

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert source.read(QKV).equal(tensors[QKV])


def test_tensors_that_are_not_contiguous_or_share_storage(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM)
    embedding = tensors["transformer.word_embeddings.weight"]
    tensors["lm_head.weight"] = embedding  # tied: one storage, two names
    turned = "transformer.layers.0.attention.dense.weight"
    tensors[turned] = tensors[turned].t().contiguous().t()
    assert not tensors[turned].is_contiguous()
    large = torch.zeros(4, 64, dtype=torch.float16)
    norm = "transformer.final_layernorm.weight"
    large[2] = tensors[norm]
    tensors[norm] = large[2]  # a row of something larger

    folder = write_bin(tmp_path / "bin", CHATGLM, tensors)
    same(open_folder(folder), tensors)
    plain = write_model(tmp_path / "plain", CHATGLM, {n: t.contiguous().clone() for n, t in tensors.items()})
    for source in (folder, plain):
        for bits in (4, 16):
            convert(source, tmp_path / f"{source.name}-{bits}", Recipe(bits=bits))
    for bits in (4, 16):
        file = f"-{bits}/model.safetensors"
        assert (tmp_path / f"bin{file}").read_bytes() == (tmp_path / f"plain{file}").read_bytes()


def test_parameters_count_as_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM2)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    folder = write_bin(tmp_path / "model", CHATGLM2, parameters)
    same(open_folder(folder), tensors)
    convert(folder, tmp_path / "out")


def anonymous_kib() -> int:
    """Memory of this process that is no view of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise AssertionError("no RssAnon")


ROWS, COLUMNS = 1 << 18, 512  # 256 MiB of half, in files that take no space on the disk


def big_safetensors(folder: Path) -> None:
    size = 2 * ROWS * COLUMNS
    file = folder / "model.safetensors"
    raw_safetensors(file, {"big": entry("F16", [ROWS, COLUMNS], 0, size)})
    os.truncate(file, file.stat().st_size + size)


def big_bin(folder: Path) -> None:
    with torch.serialization.skip_data():
        torch.save({"big": torch.empty(ROWS, COLUMNS, dtype=torch.float16)}, folder / "pytorch_model.bin")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("make", [big_safetensors, big_bin])
def test_rows_of_a_big_file_take_no_memory(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    source = open_folder(tmp_path)
    assert source.infos()["big"].nbytes == 256 << 20
    source.read("big", 0, 8)
    before = anonymous_kib()
    rows = [source.read("big", start, start + 64) for start in range(0, ROWS, ROWS // 64)]
    assert [r.shape for r in rows] == [(64, COLUMNS)] * 64
    assert not any(r.any() for r in rows)
    assert anonymous_kib() - before < 32 << 10


def test_float32_layer_norms_become_half(tmp_path: Path) -> None:
    """As in the first shards of ChatGLM-6B: float32 where training needed it, float16 where the model runs."""
    tensors = random_tensors(CHATGLM)
    norms = [name for name in tensors if "layernorm" in name]
    assert len(norms) == 4 * CHATGLM["num_layers"] + 2
    generator = torch.Generator().manual_seed(1)
    for name in norms:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    folder = write_bin(tmp_path / "model", CHATGLM, tensors)
    assert {info.dtype for name, info in open_folder(folder).infos().items() if name in norms} == {"F32"}
    for bits in (4, 16):
        convert(folder, tmp_path / f"out{bits}", Recipe(bits=bits))
        written = load_file(tmp_path / f"out{bits}" / "model.safetensors")
        for name in norms:
            assert written[name].dtype is torch.float16
            assert written[name].equal(tensors[name].half()), name


@pytest.mark.parametrize(
    ("stated", "stored"),
    [
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        (None, torch.float16),
    ],
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_float32_checkpoint_takes_the_dtype_of_its_config(
    key: str, stated: str | None, stored: torch.dtype, tmp_path: Path
) -> None:
    config = {name: value for name, value in CHATGLM2.items() if name != "torch_dtype"}
    if stated is not None:
        config[key] = stated
    tensors = random_tensors(config, torch.float32)
    convert(write_model(tmp_path / "model", config, tensors), tmp_path / "out", Recipe(bits=16))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {stored}
    assert written["lm_head.weight"].equal(tensors[HEAD].to(stored))


@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_a_hugging_face_cache_can_be_read_in_place(form: str, tmp_path: Path) -> None:
    """There, the files of a snapshot are links into a folder beside it."""
    tensors = random_tensors(CHATGLM2)
    if form == "bin":
        plain = write_bin(tmp_path / "plain", CHATGLM2, tensors)
    else:
        plain = write_model(tmp_path / "plain", CHATGLM2, tensors, shards=3 if form == "sharded" else 1)
    repository = tmp_path / "models--THUDM--chatglm3-6b"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(repository / "blobs" / f"sha{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha{number}")
    same(open_folder(snapshot), tensors)
    convert(snapshot, tmp_path / "out")
    # and through a link to the snapshot
    (tmp_path / "link").symlink_to(snapshot)
    same(open_folder(tmp_path / "link"), tensors)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM2)
    folder = write_model(tmp_path / "model", CHATGLM2, tensors)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    same(open_folder(folder), tensors)


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    """chatglm3-6b is published as both."""
    write_bin(tmp_path, CHATGLM2, random_tensors(CHATGLM2, seed=1))
    write_model(tmp_path, CHATGLM2, random_tensors(CHATGLM2, seed=2))
    same(open_folder(tmp_path), random_tensors(CHATGLM2, seed=2))


def test_shards_may_hold_more_than_the_index_gives_them(tmp_path: Path) -> None:
    """A tensor that two shards hold is read from the one that the index names."""
    tensors = random_tensors(CHATGLM2)
    write_model(tmp_path, CHATGLM2, tensors, shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / "model-00002-of-00002.safetensors"
    assert index["weight_map"][EMBEDDING] != file.name
    save_file({**load_file(file), EMBEDDING: torch.zeros(96, 128).half()}, file)
    same(open_folder(tmp_path), tensors)


def test_a_source_keeps_what_its_config_says(tmp_path: Path) -> None:
    config = {**CHATGLM2, "_name_or_path": "THUDM/智谱", "seq_length": 4096}
    write_model(tmp_path, config, random_tensors(CHATGLM2))
    assert open_folder(tmp_path).config == config
    assert open_source(tmp_path).source.config == config


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_converting_leaves_the_rows_of_a_float32_source_as_they_are(tmp_path: Path, method: str) -> None:
    """They are views of the file's mapping: writing to them would cost memory, and the next reader the truth."""
    from glmquant import _quantize, formats, quantizers
    from glmquant.plan import make_plan

    source = open_folder(GOLDEN / "chatglm-6b" / "tiny-3l")
    plan = make_plan(source, Recipe(format="cpm", method=method, quantize_embeddings=True))
    fmt, quantizer = formats.get("cpm"), quantizers.get(method)
    for item in plan.items:
        before = source.read(item.source).clone()
        for task in _quantize.tasks(item, fmt.row_multiple):
            _quantize.run(task, source, quantizer, fmt)
        assert torch.equal(source.read(item.source), before), item.name
