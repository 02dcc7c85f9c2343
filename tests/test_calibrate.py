"""Conversions with calibrated methods: families and formats, what they gain, the same bytes, resuming, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_calibrated import WINDOW, calibrated, chatglm3, divergence, two_texts
from helpers_sources import CHATGLM, CHATGLM2, write_model
from safetensors.torch import load_file
from test_evaluate import opinionated
from test_original_tokenizers_tiny import chatglm_folder, glm4_folder

import glmquant
from glmquant import Recipe, Scheme, UsageError, _kept
from glmquant._convert import plan_conversion
from glmquant._open import open_source
from glmquant._sensitivity import Kind
from glmquant._windows import CALIBRATION_SAMPLE, SAMPLE, read_text
from glmquant.calibration import Calibrator, calibration_text, layer_facts
from glmquant.checkpoint.output import CARD, REPORT
from glmquant.quantizers import QUANTIZERS, Gptq, LeastSquares
from glmquant.recipe import CALIBRATED, Calibration

MODELS = ("chatglm2", "chatglm", "glm", "glm-4")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models with tokenizers: ChatGLM3, ChatGLM-6B, the native layout of the first, and GLM-4's vocabulary."""
    root = tmp_path_factory.mktemp("models")
    later = chatglm3(root / "chatglm2")
    glmquant.convert(later, root / "glm", Recipe(bits=16))
    fourth = glm4_folder(root / "glm-4")
    rows = len(glmquant.load_tokenizer(fourth)) + 1
    config = {**CHATGLM2, "padded_vocab_size": rows, "rope_ratio": 500.0, "torch_dtype": "bfloat16"}
    write_model(fourth, config, opinionated(config))
    first = chatglm_folder(root / "chatglm")
    gmask, start, mask = glmquant.load_tokenizer(first).convert_tokens_to_ids(["[gMASK]", "<sop>", "[MASK]"])
    ids = {"gmask_token_id": gmask, "bos_token_id": start, "mask_token_id": mask}
    config = {**CHATGLM, **ids, "vocab_size": len(glmquant.load_tokenizer(first)) + 1}
    write_model(first, config, opinionated(config))
    return {path.name: path for path in root.iterdir()}


def recipe(name: str, method: str, text: Path, **options: Any) -> Recipe:
    kind: dict[str, Any] = {"format": "cpm"} if name == "chatglm" else {"group_size": 32}
    return calibrated(method, text, **{**kind, **options})


@pytest.mark.parametrize("name", MODELS)
def test_calibration_pays_on_text_that_it_has_not_seen(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    seen, unseen = texts
    found = {}
    for method in ("rtn", "weighted-mse", "gptq"):
        out = tmp_path / method
        result = glmquant.convert(models[name], out, recipe(name, method, seen))
        found[method] = divergence(out, models[name], unseen)
        assert glmquant.verify(out, source=models[name]).ok
        assert not list(out.glob(".*"))
        calibration = result.report.get("calibration")
        assert (calibration is not None) == (method in CALIBRATED)
        if calibration is not None:
            assert (calibration["text"], calibration["window"]) == ("seen.txt", WINDOW)
            assert result.report["recipe"]["calibration"]["text"] == "seen.txt"
    assert found["gptq"] < 0.3 * found["rtn"]
    assert found["weighted-mse"] < found["rtn"]


def test_one_weight_in_two_layouts_gets_the_same_codes(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    native, original = (recipe("glm", "gptq", texts[0], layout=layout) for layout in ("native", "original"))
    glmquant.convert(models["chatglm2"], tmp_path / "native", native)
    glmquant.convert(models["chatglm2"], tmp_path / "original", original)
    parts = load_file(tmp_path / "native" / "model.safetensors")
    whole = load_file(tmp_path / "original" / "model.safetensors")
    for kind in ("packed", "scale"):
        split = [parts[f"model.layers.1.self_attn.{part}_proj.weight_{kind}"] for part in "qkv"]
        fused = whole[f"transformer.encoder.layers.1.self_attention.query_key_value.weight_{kind}"]
        assert torch.equal(torch.cat(split), fused)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"group_size": "row", "bits": 8}])
def test_the_same_bytes_on_every_run(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    wanted = recipe("glm", "gptq", texts[0], **options)
    reports = [
        glmquant.convert(models["chatglm2"], tmp_path / str(n), wanted, workers=n, device="cpu").report
        for n in (1, 3)
    ]
    assert reports[0]["files"] == reports[1]["files"]


class _Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_from_its_last_block(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("glm", "gptq", texts[0])
    whole = glmquant.convert(models["chatglm2"], tmp_path / "whole", wanted, device="cpu").report
    begun: list[int] = []
    usual = Calibrator._quantized

    def killed(self: Calibrator, layer: int) -> Any:
        begun.append(layer)
        if begun == [0, 1]:
            raise _Killed
        return usual(self, layer)

    monkeypatch.setattr(Calibrator, "_quantized", killed)
    out = tmp_path / "out"
    with pytest.raises(_Killed):
        glmquant.convert(models["chatglm2"], out, wanted, device="cpu")
    assert not out.exists()
    resumed = glmquant.convert(models["chatglm2"], out, wanted, device="cpu", resume=True).report
    assert begun == [0, 1, 1]
    assert resumed["files"] == whole["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_full_disk_does_not_cost_the_blocks_that_are_done(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("glm", "gptq", texts[0])
    usual = _kept.save_file

    def full(tensors: Any, file: Path) -> None:
        if file.name.startswith("layer-1"):
            raise OSError(28, "No space left on device")
        usual(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(_kept, "save_file", full)
        with pytest.raises(glmquant.OutputError, match="--resume"):
            glmquant.convert(models["chatglm2"], tmp_path / "out", wanted, device="cpu")
    assert (tmp_path / "out.partial" / ".glmquant-calibrated" / "layer-0.safetensors").exists()
    glmquant.convert(models["chatglm2"], tmp_path / "out", wanted, device="cpu", resume=True)


def test_sensitivities_are_those_of_the_text(models: dict[str, Path], texts: tuple[Path, Path]) -> None:
    """Mean squares of hooks in the whole model; and the damage of a layer follows them."""
    calibration = Calibration(str(texts[0]), windows=8, window=WINDOW)
    opened = open_source(models["chatglm2"])
    facts = layer_facts(opened, calibration)
    found = {name: fact.squares for name, fact in facts.items()}
    model = glmquant.load(models["chatglm2"], "cpu", torch.float32)
    inputs: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, x: inputs.append(x[0].flatten(0, 1))
    )
    with torch.no_grad():
        model(calibration_text(calibration, models["chatglm2"], 256).ids)
    down = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    torch.testing.assert_close(found[down].float(), inputs[0].square().mean(0), rtol=1e-3, atol=1e-6)
    units = {
        method: glmquant.measure(models["chatglm2"], method, calibration=given).units[7]
        for method, given in (("mse", None), ("gptq", calibration))
    }
    assert units["gptq"].tensors == (down,)
    weight = opened.source.read(down).float()
    lost = (LeastSquares()(weight.half(), Scheme(4, 32)).dequantize() - weight).square().sum(0).double()
    total = weight.square().sum(0).double()
    assert units["mse"].damage[Kind(4, 32)] == pytest.approx(float(lost.sum() / total.sum()), rel=1e-4)
    weighted = float((lost * found[down]).sum() / (total * found[down]).sum())
    assert units["gptq"].damage[Kind(4, 32)] == pytest.approx(weighted, rel=1e-4)


def test_importance_is_what_an_error_costs_in_divergence(tmp_path: Path, texts: tuple[Path, Path]) -> None:
    """Every row of one layer made a little larger or smaller: the divergence that this brings is foretold."""
    source = chatglm3(tmp_path / "source", outliers=3)
    tensors = load_file(source / "model.safetensors")
    facts = layer_facts(open_source(source), Calibration(str(texts[0]), windows=6, window=WINDOW))
    ids = calibration_text(Calibration(str(texts[0]), windows=6, window=WINDOW), source, 256).ids
    model = glmquant.load(source, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(-1)
    names = {
        "o_proj": "self_attention.dense",
        "gate_up_proj": "mlp.dense_h_to_4h",
        "down_proj": "mlp.dense_4h_to_h",
    }
    foretold, measured = [], []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in names:
            continue
        name = f"transformer.encoder.layers.{path.split('.')[2]}.{names[path.rpartition('.')[2]]}.weight"
        divergences = []
        for _ in range(4):
            signs = torch.randint(0, 2, (len(module.weight), 1), generator=generator) * 2 - 1
            with torch.no_grad():
                module.weight.mul_(1 + 0.01 * signs)
                found = model(ids).logits.log_softmax(-1)
                module.weight.copy_(tensors[name])
            divergences.append(float((exact.exp() * (exact - found)).sum(-1).mean()))
        foretold.append(facts[name].importance * 0.01**2)
        measured.append(sum(divergences) / len(divergences))
    print(foretold, measured)
    ratios = [a / b for a, b in zip(foretold, measured, strict=True)]
    assert max(measured) > 5 * min(measured)
    assert 0.2 < min(ratios) < max(ratios) < 5


def test_random_tokens_in_place_of_a_text(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("chatglm2", "chatglm"):
        text = calibration_text(Calibration("random", windows=8, window=WINDOW), models[name], 256)
        assert text.ids.shape == (8, WINDOW)
        assert text.summary == {"text": "random", "windows": 0, "random_windows": 8, "window": WINDOW}
        tokenizer = glmquant.load_tokenizer(models[name])
        prefix = tokenizer.encode("")
        assert (text.ids[:, : len(prefix)] == torch.tensor(prefix)).all()
        assert not set(text.ids[:, len(prefix) :].flatten().tolist()) & set(tokenizer.all_special_ids)
        mixed = calibration_text(Calibration(str(texts[0]), windows=8, window=WINDOW), models[name], 256)
        assert len(mixed.ids) == 8 + 3
    found = {}
    for method, text_ in (("mse", None), ("gptq", Calibration("random", windows=24, window=WINDOW))):
        wanted = Recipe(method=method, group_size=32, calibration=text_)
        glmquant.convert(models["chatglm2"], tmp_path / method, wanted)
        found[method] = divergence(tmp_path / method, models["chatglm2"], texts[1])
    assert found["gptq"] < found["mse"]
    report = json.loads((tmp_path / "gptq" / REPORT).read_text())
    assert report["calibration"] == {"text": "random", "windows": 0, "random_windows": 24, "window": WINDOW}
    told = "| method | `gptq`, calibrated on random tokens, no text |"
    assert told in (tmp_path / "gptq" / CARD).read_text()


def test_layers_are_given_what_quantized_layers_before_them_compute(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments that the quantizer is given are those of hooks in the whole model, as it is quantized so far."""
    given: list[torch.Tensor] = []
    found: list[torch.Tensor] = []

    class Recording:
        def __call__(
            self, weight: torch.Tensor, scheme: Scheme, statistics: torch.Tensor | None = None
        ) -> Any:
            assert statistics is not None
            quantized = Gptq()(weight, scheme, statistics)
            given.append(statistics)
            found.append(quantized.dequantize())
            return quantized

    opened = open_source(models["chatglm2"])
    plan = plan_conversion(models["chatglm2"], recipe("glm", "gptq", texts[0]))
    assert plan.recipe.calibration is not None
    text = calibration_text(plan.recipe.calibration, models["chatglm2"], 256)
    calibrator = Calibrator(opened, plan, text, Recording(), torch.device("cpu"), tmp_path / "kept")
    calibrator._advance(1)
    model = glmquant.load(models["chatglm2"], "cpu", torch.float32)
    layers = [m for layer in model.model.layers for m in (
        layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
    )]  # fmt: skip
    for number, layer in enumerate(layers[: len(given)]):
        inputs: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(
            lambda module, x, inputs=inputs: inputs.append(x[0].flatten(0, 1))
        )
        with torch.no_grad():
            model(text.ids)
        handle.remove()
        x = inputs[0]
        torch.testing.assert_close(given[number], x.t() @ x / len(x), rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            if number % 4 == 0:  # q, k and v are one weight in the source
                attention = model.model.layers[number // 4].self_attn
                parts = (attention.q_proj, attention.k_proj, attention.v_proj)
                for part, rows in zip(
                    parts, found[number].split([len(p.weight) for p in parts]), strict=True
                ):
                    part.weight.copy_(rows)
            else:
                layer.weight.copy_(found[number])


@pytest.mark.parametrize("name", ["chatglm2", "chatglm"])
def test_attention_that_is_computed_once_changes_no_byte(
    models: dict[str, Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    calls: list[str] = []
    usual = torch.nn.functional.scaled_dot_product_attention

    def attend(*arguments: Any, **options: Any) -> Any:
        calls.append(way)
        return usual(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for way in ("once", "anew"):
        if way == "anew":
            monkeypatch.setattr(Calibrator, "_computed_once", lambda self, module: nullcontext())
        glmquant.convert(models[name], tmp_path / way, recipe(name, "gptq", texts[0]), device="cpu")
    once, anew = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("once", "anew"))
    assert once == anew
    # for what the output projection is given, then for gate and up; otherwise for down and for the block too
    assert calls.count("anew") == 2 * calls.count("once")


def test_what_stays_as_it_is_is_not_calibrated(
    models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The ends are quantized without data; the head in 8 bit hardly matters."""
    wanted = recipe("glm", "gptq", texts[0], quantize_head=True)
    plain = recipe("glm", "mse", texts[0], quantize_head=True)
    for name, each in (("gptq", wanted), ("mse", plain)):
        glmquant.convert(models["chatglm2"], tmp_path / name, each)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "mse"))
    assert torch.equal(first["lm_head.weight_packed"], second["lm_head.weight_packed"])
    assert torch.equal(first["model.norm.weight"], second["model.norm.weight"])


def test_the_bundled_samples_share_nothing() -> None:
    calibration, evaluation = (read_text(None, sample=name) for name in (CALIBRATION_SAMPLE, SAMPLE))
    lines = [{line for line in text.splitlines() if len(line) > 80} for text in (calibration, evaluation)]
    assert all(len(found) > 30 for found in lines)
    assert not lines[0] & lines[1]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in calibration)
    assert chinese > 15000  # these models speak Chinese first


def refused(text: str, call: Callable[[], object]) -> None:
    with pytest.raises(glmquant.GlmquantError, match=text):
        call()


def test_refusals(models: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = models["chatglm2"], tmp_path / "out"
    text = Calibration(str(texts[0]))
    short = tmp_path / "short.txt"
    short.write_text("the quick brown fox")
    refused(
        "--calibration does nothing for --method mse",
        lambda: plan_conversion(source, Recipe(calibration=text)),
    )
    refused("cannot be read", lambda: glmquant.convert(
        source, out, Recipe(method="gptq", group_size=32, calibration=Calibration(str(tmp_path / "none.txt")))
    ))  # fmt: skip
    refused("longer text or a smaller window", lambda: glmquant.convert(
        source, out, Recipe(method="gptq", group_size=32, calibration=Calibration(str(short)))
    ))  # fmt: skip
    refused(
        "without --asymmetric there are none",
        lambda: plan_conversion(source, Recipe(method="hqq", group_size=32)),
    )
    with pytest.raises(UsageError):
        Calibration(windows=0)
    assert not out.exists()


def test_calibrated_methods_are_those_that_planning_knows() -> None:
    assert set(CALIBRATED) < set(QUANTIZERS)
    stated = Recipe(method="gptq", calibration=Calibration("a/b.txt")).to_json()["calibration"]
    assert json.loads(json.dumps(stated)) == {"text": "b.txt", "windows": 64, "window": 512}
