"""verify(): every fault in a folder is a problem in the list; only what cannot be a checkpoint is an error."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_convert import content, small_source, stored_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

import glmquant
from glmquant import Recipe, SourceError, UsageError, Verification, verify
from glmquant.checkpoint.output import CARD, REPORT

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = GOLDEN / "chatglm2-6b" / "tiny-int4"
LAYER = "transformer.encoder.layers.1."

Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    glmquant.convert(source, out, Recipe(method="rtn", max_shard_size=150_000))
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A copy of a folder that convert wrote, in three shards, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "folder"))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A copy of a folder of THUDM's, without a report, to be damaged."""
    return Path(shutil.copytree(PUBLISHED, tmp_path / "published"))


def change(folder: Path, edit: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Sound folders


@pytest.mark.parametrize(
    "name", [f"{model}/tiny-int{bits}" for model in ("chatglm2-6b", "chatglm3-6b") for bits in (4, 8)]
)
def test_published_checkpoint(name: str) -> None:
    found = verify(GOLDEN / name)
    assert found.problems == []
    assert found.ok
    assert (found.files, found.quantized, found.errors) == (0, 12, {})
    assert found.tensors == len(load_file(GOLDEN / name / "model.safetensors"))


@pytest.mark.parametrize("name", ["tiny-3l-int4", "tiny-3l-int4-embeddings", "tiny-3l-int8"])
def test_published_first_generation(name: str) -> None:
    found = verify(GOLDEN / "chatglm-6b" / name)
    assert found.problems == []
    assert found.quantized == 12 + 2 * name.endswith("embeddings")


def test_published_checkpoint_against_its_source() -> None:
    found = verify(PUBLISHED, GOLDEN / "chatglm2-6b" / "tiny" / "bin-fp16")
    assert found.problems == []
    assert len(found.errors) == 12
    assert 0.05 < sum(found.errors.values()) / 12 < 0.2


RECIPES = [
    Recipe(),
    Recipe(bits=8, layout="original"),
    Recipe(symmetric=False, group_size=32),
    Recipe(quantize_head=True, quantize_embeddings=True),
    Recipe(format="cpm"),
    Recipe(bits=16),
    Recipe(bits=16, layout="original"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.bits}-{r.format}-{r.layout}-{r.group_size}")
def test_whatever_convert_writes(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out"
    result = glmquant.convert(source, out, recipe)
    steps = []
    found = verify(out, source, progress=lambda *step: steps.append(step))
    assert found.problems == []
    entries = result.report["tensors"]
    stated = {name: entry["relative_error"] for name, entry in entries.items() if entry["scheme"]}
    assert found.errors == pytest.approx(stated, rel=1e-5)
    assert found.quantized == len(stated)
    assert found.files == len(set(content(out)) - {REPORT, CARD})
    assert [step[0] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][:2] == (len(steps), len(steps))


# Tensors


STRUCTURE: dict[str, tuple[Change, str]] = {
    "extra": (
        lambda t: t.update({"lm_head.bias": torch.zeros(3)}),
        "lm_head.bias does not belong to the model.",
    ),
    "missing weight": (
        lambda t: drop(t, LAYER + "mlp.dense_4h_to_h.weight"),
        f"{LAYER}mlp.dense_4h_to_h.weight is missing.",
    ),
    "missing scale": (
        lambda t: drop(t, LAYER + "self_attention.dense.weight_scale"),
        f"{LAYER}self_attention.dense.weight_scale is missing.",
    ),
    "missing norm": (
        lambda t: drop(t, "transformer.encoder.final_layernorm.weight"),
        "transformer.encoder.final_layernorm.weight is missing.",
    ),
    "shape": (
        lambda t: t.update({LAYER + "self_attention.dense.weight": torch.zeros(64, 64, dtype=torch.int8)}),
        f"{LAYER}self_attention.dense.weight has shape [64, 64], config.json calls for [64, 32].",
    ),
    "code type": (
        lambda t: cast(t, LAYER + "self_attention.dense.weight", torch.uint8),
        f"{LAYER}self_attention.dense.weight is stored as U8, the format calls for I8.",
    ),
    "scale type": (
        lambda t: cast(t, LAYER + "self_attention.dense.weight_scale", torch.int16),
        f"{LAYER}self_attention.dense.weight_scale is stored as I16, the format calls for F16 or BF16 or F32.",
    ),
    "norm type": (
        lambda t: cast(t, LAYER + "input_layernorm.weight", torch.int8),
        f"{LAYER}input_layernorm.weight is stored as I8, the format calls for F16 or BF16 or F32.",
    ),
    "NaN in a scale": (
        lambda t: fill(t, LAYER + "mlp.dense_h_to_4h.weight_scale", float("nan")),
        f"{LAYER}mlp.dense_h_to_4h.weight decodes to NaN or infinity in rows 0 to 271.",
    ),
    "infinite scale": (
        lambda t: fill(t, LAYER + "mlp.dense_h_to_4h.weight_scale", float("inf")),
        f"{LAYER}mlp.dense_h_to_4h.weight decodes to NaN or infinity in rows 0 to 271.",
    ),
    "NaN in a copy": (
        lambda t: fill(t, "transformer.embedding.word_embeddings.weight", float("nan")),
        "transformer.embedding.word_embeddings.weight holds NaN or infinity in rows 0 to 319.",
    ),
}


def drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def cast(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> None:
    tensors[name] = tensors[name].to(dtype)


def fill(tensors: dict[str, Tensor], name: str, value: float) -> None:
    tensors[name].view(-1)[5] = value


@pytest.mark.parametrize("fault", STRUCTURE)
def test_faults_in_tensors(published: Path, fault: str) -> None:
    edit, problem = STRUCTURE[fault]
    change(published, edit)
    assert verify(published).problems == [problem]


def test_all_faults_are_listed(published: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in ("extra", "missing weight", "scale type", "missing norm"):
            STRUCTURE[name][0](tensors)

    change(published, edit)
    expected = {STRUCTURE[name][1] for name in ("extra", "missing weight", "scale type", "missing norm")}
    assert set(verify(published).problems) == expected


def test_wrong_shape_constant_of_compressed_tensors(folder: Path) -> None:
    """compressed-tensors states the shape of the unpacked weight in a tensor of its own."""
    path = next(p for p in sorted(folder.glob("*.safetensors")) if any("_shape" in n for n in load_file(p)))
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("_shape"))
    tensors[name][1] += 8
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / REPORT).unlink()
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{name} does not hold ")


# Files


def test_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = verify(folder)
    assert found.problems == ["model-00002-of-00003.safetensors is missing."]
    (folder / REPORT).unlink()
    (problem,) = verify(folder).problems
    assert re.match(r"shard '?model-00002-of-00003.safetensors'? is missing from", problem)


def test_missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert verify(folder).problems == ["model.safetensors.index.json is missing."]


def test_short_and_torn_files(folder: Path, published: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = verify(folder).problems
    assert problem == f"{shard.name} has {size - 1} bytes, the report says {size}."
    (published / "model.safetensors").write_bytes(b"\xff" * 100)
    (problem,) = verify(published).problems
    assert "model.safetensors is not a sound safetensors file" in problem


def test_torn_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    (problem,) = verify(folder).problems
    assert problem.startswith("config.json has ")


def test_changed_weights_are_named_against_the_source(source: Path, folder: Path) -> None:
    """The hash says which file has changed, decoding which weight."""
    shard = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("down_proj.weight_scale"))
    tensors[name] *= 2
    save_file(tensors, shard, metadata={"format": "pt"})
    first, second = verify(folder, source).problems
    assert first.startswith(shard.name)
    assert second.startswith(name.removesuffix("_scale") + " has a relative error of ")


def test_changed_copy_is_named_against_the_source(source: Path, folder: Path) -> None:
    (folder / REPORT).unlink()
    shard = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][300, 3] += 0.001
    save_file(tensors, shard, metadata={"format": "pt"})
    assert verify(folder).ok  # nothing to tell it by
    (problem,) = verify(folder, source).problems
    assert problem.startswith(
        "model.embed_tokens.weight is a copy that differs from this source in rows 0 to 319"
    )


@pytest.mark.parametrize(
    "report",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"config.json": {}}}',
    ],
)
def test_damaged_report(folder: Path, report: str) -> None:
    (folder / REPORT).write_text(report)
    found = verify(folder)
    assert found.problems == [f"{REPORT} is damaged; nothing could be compared with it."]
    assert found.files == 0
    assert found.quantized == 12  # the weights were looked at all the same


# Not a problem of the folder, but of the question


def test_a_report_that_names_a_file_outside(folder: Path) -> None:
    (folder / REPORT).write_text('{"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}')
    (problem,) = verify(folder).problems
    assert problem.startswith(
        f"{REPORT} names '../../etc/passwd', which is outside {folder}; nothing was read."
    )


@pytest.mark.parametrize("name", ["config.json", "*.safetensors"])
def test_a_link_out_of_the_folder_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    path = min(folder.glob(name))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (problem,) = verify(folder).problems
    assert problem.startswith(f"{path} is a link to {tmp_path / 'elsewhere'}, outside the checkpoint folder")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json does not exist"):
        verify(tmp_path)
    with pytest.raises(SourceError):
        verify(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SourceError, match="llama"):
        verify(tmp_path)


def test_source_of_other_sizes(source: Path, converted: Path, tmp_path: Path) -> None:
    for name, sizes in {"deeper": {"layers": 3}, "wider": {"ffn": 512}, "more words": {"vocab": 384}}.items():
        other = small_source(tmp_path / name, **sizes)
        with pytest.raises(
            SourceError, match=r"is a model of other sizes .* pass the checkpoint it was made from"
        ):
            verify(converted, other)
    with pytest.raises(SourceError, match="pass the checkpoint it was made from"):
        verify(converted, GOLDEN / "chatglm-6b" / "tiny-3l")


def test_wrong_source_of_the_same_sizes(converted: Path, tmp_path: Path) -> None:
    other = small_source(tmp_path / "other", seed=1)
    found = verify(converted, other)
    named = {problem.split()[0] for problem in found.problems}
    assert named == set(json.loads((converted / REPORT).read_text())["tensors"])
    assert min(found.errors.values()) > 1  # unrelated weights: sqrt(2)


def test_forgotten_adapter(folder: Path, source: Path) -> None:
    report = json.loads((folder / REPORT).read_text())
    edit_json(folder / REPORT, source=report["source"] | {"adapter": True})
    with pytest.raises(UsageError, match=r"pass it with --adapter"):
        verify(folder, source)
    assert verify(folder).ok


def test_verification_object(folder: Path) -> None:
    found = verify(str(folder))
    assert isinstance(found, Verification)
    assert found.folder == folder
    assert found.tensors == len(stored_tensors(folder))
