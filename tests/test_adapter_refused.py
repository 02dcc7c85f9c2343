"""Adapters that cannot be merged: each is refused in a sentence that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapter import lora, original_weights, skeleton, train
from helpers_sources import (
    CHATGLM2,
    QKV,
    Tensors,
    random_tensors,
    refused,
    write_bin,
    write_json,
    write_model,
)
from peft import IA3Config, PeftConfig
from safetensors.torch import load_file, save_file

from glmquant import UnsafeFileError, convert

MODULE = QKV.removesuffix(".weight")
A, B = (f"base_model.model.{MODULE}.lora_{half}.weight" for half in "AB")
CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", CHATGLM2, random_tensors(CHATGLM2))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA; the tests below change one thing about it."""
    folder = tmp_path_factory.mktemp("adapter")
    train(skeleton(original_weights()), lora(), folder)
    return folder


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def edit(adapter: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(adapter / FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / FILE)


def set_config(adapter: Path, **values: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    write_json(adapter / CONFIG, {name: v for name, v in {**config, **values}.items() if v != "absent"})


def test_the_unchanged_adapter_is_sound(base: Path, adapter: Path, out: Path) -> None:
    assert {A, B} <= set(load_file(adapter / FILE))
    convert(base, out, adapter=adapter)


# What PEFT writes for other methods than a plain LoRA.

OTHER_METHODS: dict[str, tuple[PeftConfig, str]] = {
    "dora": (lora(use_dora=True), "use_dora"),
    "bias-lora-only": (lora(target_modules=["query_key_value"], bias="lora_only"), "trained biases"),
    "bias-all": (lora(target_modules=["query_key_value"], bias="all"), "trained biases"),
    "bias-of-b": (lora(target_modules=["query_key_value"], lora_bias=True), "lora_bias"),
    "ia3": (
        IA3Config(target_modules=["query_key_value"], feedforward_modules=[]),
        "type IA3; only LORA can be merged",
    ),
    "pissa": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "olora": (lora(init_lora_weights="olora"), "init_lora_weights='olora'"),
}


@pytest.mark.parametrize(("config", "said"), OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_other_methods(config: PeftConfig, said: str, base: Path, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "adapter"
    train(skeleton(original_weights()), config, folder)
    refused(base, out, str(folder), said, adapter=folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("trainable_token_indices", [3]),
    ],
)
def test_variants_of_lora(field: str, value: Any, base: Path, adapter: Path, out: Path) -> None:
    set_config(adapter, **{field: value})
    refused(base, out, str(adapter), f"variant of LoRA ({field})", "merge it with PEFT", adapter=adapter)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING"])
def test_prefixes(kind: str, base: Path, adapter: Path, out: Path) -> None:
    set_config(adapter, peft_type=kind)
    refused(base, out, str(adapter), f"a {kind} prefix", "base model", adapter=adapter)


@pytest.mark.parametrize("with_config", [True, False], ids=["folder", "only-the-bin"])
def test_thudms_p_tuning(with_config: bool, base: Path, tmp_path: Path, out: Path) -> None:
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.zeros(128, 512).half()}
    folder = write_bin(tmp_path / "checkpoint-3000", {**CHATGLM2, "pre_seq_len": 128}, prefix)
    if not with_config:
        (folder / "config.json").unlink()
    refused(base, out, str(folder), "P-tuning", "cannot be merged", "base model", adapter=folder)


def test_a_model_is_no_adapter(base: Path, tmp_path: Path, out: Path) -> None:
    refused(base, out, str(base), "holds no adapter_config.json", adapter=base)
    folder = write_bin(tmp_path / "model", CHATGLM2, random_tensors(CHATGLM2))
    message = refused(base, out, str(folder), "holds no adapter_config.json", adapter=folder)
    assert "P-tuning" not in message


# Tensors that do not fit.


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (A, (4, 64), "[4, 64]"),
        (A, (5, 128), "[5, 128]"),
        (A, (512,), "[512]"),
        (B, (512, 4), "[512, 4]"),
        (B, (640, 5), "[640, 5]"),
        (B, (640,), "[640]"),
    ],
)
def test_a_wrong_shape(
    name: str, shape: tuple[int, ...], said: str, base: Path, adapter: Path, out: Path
) -> None:
    edit(adapter, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(base, out, MODULE, said, "[640, 128]", "another model", adapter=adapter)


def test_the_rank_of_another_config(base: Path, adapter: Path, out: Path) -> None:
    set_config(adapter, r=8)
    refused(base, out, "rank 8", "[128, 4] x [4, 256]", "[128, 8]", adapter=adapter)


@pytest.mark.parametrize(("half", "left"), [(A, "B"), (B, "A")], ids=["no-A", "no-B"])
def test_half_a_lora(half: str, left: str, base: Path, adapter: Path, out: Path) -> None:
    edit(adapter, lambda tensors: tensors.pop(half))
    refused(base, out, f"only the {left} half", MODULE, FILE, adapter=adapter)


@pytest.mark.parametrize(
    "module", ["transformer.encoder.layers.2.mlp.dense_h_to_4h", "model.layers.0.mlp.up_proj", "vision", ""]
)
def test_a_module_of_another_model(module: str, base: Path, adapter: Path, out: Path) -> None:
    def move(tensors: Tensors) -> None:
        for half in (A, B):
            tensors[half.replace(MODULE, module)] = tensors.pop(half)

    edit(adapter, move)
    refused(base, out, f"a module {module}", "does not have", FILE, adapter=adapter)


def test_a_norm_has_no_lora(base: Path, adapter: Path, out: Path) -> None:
    module = "transformer.encoder.layers.0.input_layernorm"
    edit(adapter, lambda t: t.update({f"{module}.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}))
    refused(base, out, module, adapter=adapter)


@pytest.mark.parametrize("key", ["lora_embedding_A", "lora_magnitude_vector", "something"])
def test_something_else(key: str, base: Path, adapter: Path, out: Path) -> None:
    edit(adapter, lambda tensors: tensors.update({f"base_model.model.{MODULE}.{key}": torch.zeros(4)}))
    refused(base, out, f"{MODULE}.{key}", "neither half of a LoRA", adapter=adapter)


def test_a_saved_module_of_another_size(base: Path, adapter: Path, out: Path) -> None:
    name = "transformer.output_layer.weight"
    edit(adapter, lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(100, 128)}))
    refused(base, out, name, "[100, 128]", "[96, 128]", adapter=adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", [A, B], ids=["A", "B"])
def test_numbers_that_are_none(name: str, value: float, base: Path, adapter: Path, out: Path) -> None:
    edit(adapter, lambda tensors: tensors[name].__setitem__((0, 0), value))
    refused(base, out, MODULE, FILE, "NaN or an infinite value", adapter=adapter)


# Files.


@pytest.mark.parametrize(
    "values",
    [
        {"r": "absent"},
        {"r": 0},
        {"r": "four"},
        {"lora_alpha": None},
        {"rank_pattern": ["x"]},
        {"alpha_pattern": {"(": 3}},
    ],
    ids=str,
)
def test_a_bad_config(values: dict[str, Any], base: Path, adapter: Path, out: Path) -> None:
    set_config(adapter, **values)
    refused(base, out, CONFIG, adapter=adapter)


def test_a_config_that_is_no_json(base: Path, adapter: Path, out: Path) -> None:
    (adapter / CONFIG).write_text("{")
    refused(base, out, str(adapter / CONFIG), "JSON", adapter=adapter)


def test_no_weights(base: Path, adapter: Path, out: Path) -> None:
    (adapter / FILE).unlink()
    refused(base, out, str(adapter), FILE, "adapter_model.bin", adapter=adapter)


def test_truncated_weights(base: Path, adapter: Path, out: Path) -> None:
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:-1])
    refused(base, out, str(adapter / FILE), "damaged", adapter=adapter)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code(base: Path, adapter: Path, tmp_path: Path, out: Path) -> None:
    (adapter / FILE).unlink()
    torch.save({A: Payload(tmp_path / "run")}, adapter / "adapter_model.bin")
    refused(base, out, "adapter_model.bin", "nothing in it was run", error=UnsafeFileError, adapter=adapter)
    assert not (tmp_path / "run").exists()


def test_a_link_out_of_the_folder(base: Path, adapter: Path, tmp_path: Path, out: Path) -> None:
    (adapter / FILE).rename(tmp_path / "elsewhere")
    (adapter / FILE).symlink_to(tmp_path / "elsewhere")
    refused(base, out, FILE, "link", error=UnsafeFileError, adapter=adapter)


@pytest.mark.parametrize("name", ["absent", "adapter/adapter_config.json"])
def test_no_folder(name: str, base: Path, adapter: Path, out: Path) -> None:
    refused(base, out, str(adapter.parent / name), "is not a folder", adapter=adapter.parent / name)
