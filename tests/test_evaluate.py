"""`glmquant.evaluate`: what it measures is what two whole models give; bad input; memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import FIRST, FIRST_QUANTIZED, LATER, LATER_QUANTIZED, expected, largest_difference
from helpers_sources import CHATGLM, CHATGLM2, random_tensors, write_model
from test_original_tokenizers_tiny import chatglm_folder, sentencepiece_folder

import glmquant
from glmquant import Evaluation, ModelError, Recipe, SourceError, UsageError
from glmquant._windows import SAMPLE, cut, halves, read_text
from glmquant.models.blocks import BlockwiseModel
from glmquant.models.building import open_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog, again and again. 你好世界，今天天气很好。\n" * 40
WINDOW = 32


@pytest.mark.parametrize("name", [*FIRST, *FIRST_QUANTIZED, *LATER, *LATER_QUANTIZED])
def test_block_by_block_a_model_computes_the_golden_logits(name: str) -> None:
    folder, truth = expected(name)
    case = "prompt_and_answer" if name.startswith("chatglm-6b") else "single"
    if f"{case}.input_ids" not in truth:
        case = next(key for key in truth if key.endswith(".input_ids")).removesuffix(".input_ids")
    checkpoint = open_checkpoint(folder)
    model = BlockwiseModel(checkpoint, torch.float32, "cpu")
    names: list[str] = []
    ids = truth[f"{case}.input_ids"]
    states = model.hidden_states(ids, names.append)
    assert len(names) == checkpoint.dims.layers + 2 == model.blocks - 1
    with model.head() as head, torch.no_grad():
        logits = torch.stack([head(state) for state in states])
    assert largest_difference(logits, truth[f"{case}.logits"]) <= 1e-3
    assert all(parameter.is_meta for parameter in model._model.parameters())


def opinionated(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights large enough that what comes out depends on them."""
    tensors = random_tensors(config)
    tensors.pop("lm_head.weight", None)  # ChatGLM-6B's is the embedding
    return {name: 6 * tensor if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models that have a tokenizer: a later one, the same in INT4, ChatGLM-6B and its INT4."""
    root = tmp_path_factory.mktemp("models")
    config = {**CHATGLM2, "padded_vocab_size": 512}
    source = sentencepiece_folder(root / "source", "chatglm3-6b")
    write_model(source, config, opinionated(config))
    first = chatglm_folder(root / "first")
    marks = ("[gMASK]", "<sop>", "[MASK]")
    gmask, start, mask = glmquant.load_tokenizer(first).convert_tokens_to_ids(list(marks))
    rows = len(glmquant.load_tokenizer(first)) + 1
    v1 = {
        **CHATGLM,
        "gmask_token_id": gmask,
        "bos_token_id": start,
        "mask_token_id": mask,
        "vocab_size": rows,
    }
    write_model(first, v1, opinionated(v1))
    glmquant.convert(source, root / "int4", Recipe(method="rtn"))
    glmquant.convert(first, root / "first-int4", Recipe(format="cpm"))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@torch.inference_mode()
def by_hand(out: Path, source: Path, ids: torch.Tensor, scored: int) -> dict[str, torch.Tensor]:
    """The figures from two whole models, in float64."""
    logs = [
        glmquant.load(folder, "cpu", torch.float32)(ids).logits[:, -scored - 1 : -1].double().log_softmax(-1)
        for folder in (source, out)
    ]
    nll = [-log.gather(-1, ids[:, -scored:, None])[..., 0] for log in logs]
    return {
        "source_perplexity": nll[0].mean().exp(),
        "perplexity": nll[1].mean().exp(),
        "perplexity_ratio": (nll[1] - nll[0]).mean().exp(),
        "kl_mean": (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean(),
        "top1_agreement": (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean(),
    }


@pytest.mark.parametrize("stride", [None, 10])
@pytest.mark.parametrize(("out", "source"), [("int4", "source"), ("first-int4", "first")])
def test_the_figures_are_those_of_whole_models(
    models: dict[str, Path], text: Path, out: str, source: str, stride: int | None
) -> None:
    found = glmquant.evaluate(models[out], models[source], text, window=WINDOW, stride=stride, device="cpu")
    tokenizer = glmquant.load_tokenizer(models[source])
    plain = tokenizer.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    marks = ["[gMASK]", "<sop>" if source == "first" else "sop"]
    size = WINDOW - 2
    step = stride or size
    starts = range(0, len(plain) - size + 1, step)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(marks) + plain[s : s + size] for s in starts])
    assert (found.windows, found.prefix, found.stride) == (len(ids), 2, step)
    assert found.predictions == len(ids) * step
    for name, value in by_hand(models[out], models[source], ids, step).items():
        figure = getattr(found, name)
        assert figure.value == pytest.approx(float(value), rel=1e-3, abs=1e-8), name
        assert figure.error is not None
    assert 1e-6 < found.kl_mean.value < found.kl_p99.value
    assert found == glmquant.evaluate(
        models[out], models[source], text, window=WINDOW, stride=stride, device="cpu"
    )


def test_a_model_does_not_differ_from_itself(models: dict[str, Path], text: Path) -> None:
    folder = models["source"]
    found = glmquant.evaluate(folder, folder, text, window=WINDOW, windows=1, device="cpu")
    assert found.perplexity == found.source_perplexity
    figures = found.perplexity_ratio, found.kl_mean, found.kl_p99, found.top1_agreement
    assert [f.value for f in figures] == [1, 0, 0, 1]
    assert all(f.error is None for f in figures)  # of one window nothing is known


def test_standard_errors_are_those_of_the_windows() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    found = glmquant.Estimate.mean(values)
    assert found.value == 3
    assert found.error == pytest.approx((10 / 3) ** 0.5 / 2)
    assert found.exp().error == pytest.approx(found.error * 2.718281828**3)


class Letters:
    """A tokenizer with a token for every character, and nothing that is put before a text."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(character) for character in text]


def test_without_special_tokens_the_first_token_is_not_predicted() -> None:
    windows = cut("abcdefghij", Letters(), 4)
    assert windows.ids.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert (windows.prefix, windows.stride, windows.scored) == (0, 4, 3)
    overlapping = cut("abcdefghij", Letters(), 4, stride=2, most=3)
    assert [row[0] for row in overlapping.ids.tolist()] == [97, 99, 101]
    assert overlapping.scored == 2


def test_the_sample_is_of_the_second_half_of_its_file() -> None:
    sample = read_text(None)
    assert len(sample) > 80_000
    validation = Path(__file__).resolve().parents[2] / "shared/data/wikitext-2/valid.txt"
    if not validation.exists():
        pytest.skip(f"{validation} is not at hand")
    assert sample.strip("\n") in read_text(validation, second_half=True)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("a\nb\nc\nd\n", "a\nb\n"),
        ("a\nbb\ncc\nd\n", "a\nbb\n"),
        ("a long line\nb\n", "a long line\n"),
        ("one line\n", "one "),
        ("one line", "one "),
        ("", ""),
    ],
)
def test_halves_share_no_line_if_there_are_several(text: str, first: str) -> None:
    assert halves(text) == (first, text[len(first) :])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 200}, "the text has .* tokens, and one window needs 198"),
        ({"window": 300}, "a window of 300 tokens is longer than the 256 that"),
        ({"window": 2}, "no room for text; give at least 6"),
        ({"window": 16, "stride": 15}, "a stride of 15 would leave out text .* give 1 to 14"),
        ({"window": 16, "stride": 0}, "a stride of 0 would"),
        ({"window": 16, "windows": 0}, "0 windows are none"),
        ({"window": 16, "dtype": "int8"}, "dtype 'int8' is not one to compute in"),
        ({"window": 16, "device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"window": 16, "device": "cuda:7"}, "device 'cuda:7' cannot be used here .*; use 'cpu', or a build"),
    ],
)
def test_sizes_that_make_no_window(
    models: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:100], encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        glmquant.evaluate(models["int4"], models["source"], text, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "is not UTF-8 .byte 0."), (b"", "the text has 0 tokens")],
)
def test_texts_that_are_none(
    models: dict[str, Path], tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises((SourceError, UsageError), match=message):
        glmquant.evaluate(models["int4"], models["source"], text, window=16)


def test_models_that_do_not_belong_together(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has a vocabulary of .* tokens and .* one of 512"):
        glmquant.evaluate(models["first-int4"], models["source"], text, window=16)
    other = sentencepiece_folder(tmp_path / "other", "chatglm2-6b")
    (other / "tokenizer.model").unlink()
    config = json.loads((models["source"] / "config.json").read_text())
    write_model(other, config, random_tensors(config))
    with pytest.raises(SourceError, match="has no tokenizer that is known here"):
        glmquant.evaluate(other, models["source"], text, window=16)


def test_tokenizers_that_differ(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    from helpers_tokenizers import configure, train

    other = train(tmp_path / "other", vocab_size=340)
    configure(other, name_or_path="THUDM/chatglm3-6b")
    config = json.loads((models["source"] / "config.json").read_text())
    write_model(other, config, random_tensors(config))
    with pytest.raises(UsageError, match=r"the tokenizers of .*other and .*source give different tokens"):
        glmquant.evaluate(other, models["source"], text, window=16)


def broken(models: dict[str, Path], folder: Path, name: str) -> Path:
    """The source model with NaN in a tensor."""
    sentencepiece_folder(folder, "chatglm3-6b")
    config = json.loads((models["source"] / "config.json").read_text())
    tensors = random_tensors(config)
    tensors[name][-1] = torch.nan
    return write_model(folder, config, tensors)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("transformer.encoder.layers.1.input_layernorm.weight", "layer 1"),
        ("transformer.output_layer.weight", "the head"),
    ],
)
def test_nan_is_a_fault_of_the_model(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str, where: str
) -> None:
    folder = broken(models, tmp_path / "broken", name)
    with pytest.raises(ModelError, match=f"broken is at fault: {where} gives NaN or infinity in window 0"):
        glmquant.evaluate(folder, models["source"], text, window=16, device="cpu")
    command = [sys.executable, "-m", "glmquant.cli", "eval", str(folder), "--source", str(models["source"])]
    done = subprocess.run([*command, "--text", str(text), "--window", "16"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is at fault" in done.stderr
    assert "Traceback" not in done.stderr


def test_figures_are_kept_for_the_model_card(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models["int4"], tmp_path / "out"))
    command = [
        sys.executable,
        "-m",
        "glmquant.cli",
        "eval",
        "--source",
        str(models["source"]),
        "--record",
        "--json",
    ]
    command += ["--text", str(text), "--window", "16", "--device", "cpu"]
    done = subprocess.run([*command, str(out)], capture_output=True, text=True, check=True)
    shown, kept = json.loads(done.stdout), json.loads((out / "evaluation.json").read_text())
    assert kept == {**{k: v for k, v in shown.items() if k not in ("out", "source")}, "text": text.name}
    card = (out / "README.md").read_text()
    assert f"| perplexity | {shown['perplexity']['value']:.4g}" in card
    assert str(tmp_path) not in card + (out / "evaluation.json").read_text()
    assert glmquant.verify(out).ok
    done = subprocess.run([*command, str(models["source"])], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--record keeps the figures in a folder that convert wrote" in done.stderr


PROGRAM = """
import re, sys, threading
import glmquant
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
options = dict(window=16, windows=2, device="cpu", dtype="bfloat16")
glmquant.evaluate(sys.argv[2], sys.argv[2], sys.argv[3], **options)  # what imports and first calls cost
peak, done, before = 0, threading.Event(), anonymous()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
glmquant.evaluate(sys.argv[1], sys.argv[1], sys.argv[3], **options)
done.set(); watcher.join()
print(peak - before)
"""


@pytest.mark.slow
def test_no_model_is_ever_whole_in_memory(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    config = {
        **CHATGLM2, "num_layers": 24, "hidden_size": 768, "ffn_hidden_size": 2048, "kv_channels": 64,
        "num_attention_heads": 12, "padded_vocab_size": 512, "torch_dtype": "bfloat16",
    }  # fmt: skip
    folder = sentencepiece_folder(tmp_path / "model", "chatglm3-6b")
    write_model(folder, config, random_tensors(config, torch.bfloat16))
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", PROGRAM, str(folder), str(models["source"]), str(text)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert whole > 280e6
    assert peak < whole / 2  # of either of the two models


def test_the_command_prints_a_table_or_json(models: dict[str, Path], text: Path) -> None:
    from click.testing import CliRunner

    from glmquant.cli import main

    arguments = ["eval", str(models["int4"]), "--source", str(models["source"]), "--text", str(text)]
    arguments += ["--window", "32", "--windows", "3", "--device", "cpu"]
    table = CliRunner().invoke(main, arguments)
    assert table.exit_code == 0, table.output
    for label in (
        "3 of 32 tokens, of which 2 are the tokenizer's",
        "perplexity",
        "KL divergence",
        "same top token",
    ):
        assert label in table.output
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert found.keys() == Evaluation.__dataclass_fields__.keys()
    assert found["windows"] == 3
    short = CliRunner().invoke(main, [*arguments, "--window", "250", "--stride", "300"])
    assert short.exit_code == 2
    assert SAMPLE not in short.output
