"""`import glmquant.auto`: THUDM's model cards on tiny folders, as written there but for that import."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers_cards import plant_code, published, run_card
from helpers_tokenizers import require_published

import glmquant
from glmquant import Recipe

REPORT = """
import json
report = {"text": response, "turns": len(history), "type": type(tokenizer).__name__, "bits": model.quantized_bits}
print(json.dumps(report))
"""

CHATGLM_6B = """
import glmquant.auto
import torch
torch.manual_seed(0)
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("CARD", trust_remote_code=True)
model = AutoModel.from_pretrained("CARD", trust_remote_code=True).half().cuda()
response, history = model.chat(tokenizer, "你好", history=[])
print(response)
response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history)
print(response)
"""

CHATGLM3_6B = """
import glmquant.auto
import torch
torch.manual_seed(0)
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("CARD", trust_remote_code=True)
model = AutoModel.from_pretrained("CARD", trust_remote_code=True).half().cuda()
model = model.eval()
response, history = model.chat(tokenizer, "你好", history=[])
print(response)
response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history)
print(response)
"""

MODELSCOPE = CHATGLM3_6B.replace("from transformers import AutoTokenizer, AutoModel", """
from modelscope import AutoTokenizer, AutoModel, snapshot_download
model_dir = "CARD"  # what snapshot_download("ZhipuAI/chatglm3-6b-32k", revision="v1.0.0") returns""").replace(
    'from_pretrained("CARD"', "from_pretrained(model_dir"
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


def card(root: Path, model: str) -> Path:
    return root / model if (root / model).exists() else published(root, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "program", "turns"),
    [
        ("chatglm-6b", CHATGLM_6B, 2),
        ("chatglm2-6b", CHATGLM3_6B, 2),
        ("chatglm3-6b", CHATGLM3_6B, 4),
        ("chatglm3-6b-32k", CHATGLM3_6B, 4),
        ("glm-4-9b-chat", CHATGLM3_6B, 4),
    ],
)
def test_the_card_runs_as_written(root: Path, tmp_path: Path, model: str, program: str, turns: int) -> None:
    report = run_card(program + REPORT, card(root, model), tmp_path)[-1]
    assert report["turns"] == turns
    assert isinstance(report["text"], (str, dict))
    assert report["bits"] is None


@pytest.mark.slow
def test_the_modelscope_card_of_the_32k_model(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelscope")
    report = run_card(MODELSCOPE + REPORT, card(root, "chatglm3-6b-32k"), tmp_path)[-1]
    assert (report["turns"], report["type"]) == (4, "ChatGLM3Tokenizer")


@pytest.mark.parametrize("model", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_native_folders_chat_alike(root: Path, tmp_path: Path, model: str) -> None:
    """What `convert` makes of a folder answers as the folder does, without a file of THUDM's code."""
    require_published(
        model
    )  # a small vocabulary is half bytes, and broken characters are spelled differently
    glmquant.convert(card(root, model), tmp_path / "native", Recipe(bits=16))
    answers = []
    for folder in (card(root, model), tmp_path / "native"):
        torch.manual_seed(1)
        tokenizer, loaded = glmquant.load_tokenizer(folder), glmquant.load(folder, device="cpu")
        assert loaded.generation_config.eos_token_id is not None
        answers.append(loaded.chat(tokenizer, "你好", history=[], min_new_tokens=5, max_new_tokens=20))
    assert answers[0] == answers[1]
    assert len(answers[0][0]) > 0


def converted(root: Path, model: str, bits: int) -> Path:
    """The folder as THUDM published it in INT4 or INT8, with its code and tokenizer."""
    folder = root / f"{model}-int{bits}"
    if not folder.exists():
        glmquant.convert(card(root, model), folder, Recipe(bits=bits, format="cpm"))
        shutil.copy(card(root, model) / "tokenizer_config.json", folder)
        plant_code(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("model", "bits"), [("chatglm-6b", 4), ("chatglm2-6b", 4), ("chatglm3-6b", 8)])
def test_the_card_of_a_quantized_model(root: Path, tmp_path: Path, model: str, bits: int) -> None:
    report = run_card(CHATGLM3_6B + REPORT, converted(root, model, bits), tmp_path)[-1]
    assert report["bits"] == bits


QUANTIZE = CHATGLM3_6B.replace(".half().cuda()", ".half().quantize(4).cuda()")
ON_THE_CPU = CHATGLM3_6B.replace(".half().cuda()", ".float()").replace("AutoModel", "AutoModelForCausalLM")
WITH_OPTIONS = CHATGLM3_6B.replace(
    "trust_remote_code=True).half().cuda()",
    "trust_remote_code=True, revision='main', device_map='auto', torch_dtype=torch.float16, low_cpu_mem_usage=True)",
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chatglm-6b", "chatglm3-6b"])
@pytest.mark.parametrize(
    ("program", "bits"),
    [
        (QUANTIZE, 4),
        (ON_THE_CPU, None),
        (WITH_OPTIONS, None),
        (CHATGLM3_6B.replace(", trust_remote_code=True", ""), None),
    ],
    ids=["quantize", "float", "options", "no-trust"],
)
def test_variants_of_the_card(root: Path, tmp_path: Path, model: str, program: str, bits: int | None) -> None:
    assert run_card(program + REPORT, card(root, model), tmp_path)[-1]["bits"] == bits


STREAM = (
    CHATGLM3_6B.partition("response, history")[0]
    + """
import json
pieces = [(response, len(history)) for response, history in model.stream_chat(tokenizer, "你好", history=[])]
print(json.dumps(pieces))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_the_card_streams(root: Path, tmp_path: Path, model: str) -> None:
    pieces = run_card(STREAM, card(root, model), tmp_path)[-1]
    texts = [text for text, _ in pieces]
    assert len(texts) >= 1
    assert all("\ufffd" not in text for text in texts if isinstance(text, str))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "bits", "program"),
    [
        ("chatglm3-6b", 4, CHATGLM3_6B),
        ("chatglm3-6b", 8, CHATGLM3_6B),
        ("chatglm3-6b", 16, CHATGLM3_6B),
        ("chatglm3-6b", 16, QUANTIZE),
        ("chatglm3-6b", 4, ON_THE_CPU),
        ("chatglm2-6b", 4, CHATGLM3_6B),
        ("glm-4-9b-chat", 4, CHATGLM3_6B),
    ],
    ids=lambda value: str(value) if not str(value).startswith("\n") else "card",
)
def test_the_card_runs_on_what_convert_writes(
    root: Path, tmp_path: Path, model: str, bits: int, program: str
) -> None:
    folder = root / f"{model}-native-{bits}"
    if not folder.exists():
        glmquant.convert(
            card(root, model), folder, Recipe(bits=16) if bits == 16 else Recipe(bits=bits, group_size=32)
        )
    report = run_card(program + REPORT, folder, tmp_path)[-1]
    assert report["turns"] == (2 if model == "chatglm2-6b" else 4)
    assert report["bits"] == (4 if program is QUANTIZE else bits if bits < 16 else None)
