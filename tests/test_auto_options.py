"""transformers' Auto classes on ``chatglm`` folders with `glmquant.auto` imported: options, code, adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_adapter import lora, original_weights, skeleton, train
from helpers_cards import MARK, offline, plant_code, published
from helpers_models import golden
from helpers_sources import tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import glmquant
from glmquant import Recipe, SourceError, UnsafeFileError, UsageError
from glmquant.auto import register
from glmquant.checkpoint.output import REPORT
from glmquant.models.chatglm_config import ChatGLMConfig

IDS = torch.arange(9)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path, {"auto_map": {"AutoModel": "modeling_chatglm.X"}})
    plant_code(folder)
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("trust", [None, False, True])
def test_every_auto_class_loads_the_same_model(folder: Path, auto: Any, trust: bool | None) -> None:
    register()  # twice does no harm
    model = auto.from_pretrained(folder, trust_remote_code=trust)
    assert torch.equal(logits(model), logits(glmquant.load(folder, device="cpu")))
    assert (model.dtype, model.device.type, model.training) == (torch.float16, "cpu", False)
    assert not (folder / MARK).exists()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    assert isinstance(config, ChatGLMConfig)
    assert (config.num_layers, config.padded_vocab_size, config.seq_length) == (2, 96, 256)
    assert not (folder / MARK).exists()


def test_the_planted_code_does_run_without_us(folder: Path, tmp_path: Path) -> None:
    """What these tests look for is what stock transformers does when it is told to trust."""
    call = f"AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    program = f"from transformers import AutoConfig; {call}"
    for prefix, runs in (("import glmquant.auto; ", False), ("", True)):
        command = [sys.executable, "-c", prefix + program]
        subprocess.run(command, check=False, capture_output=True, env=offline(tmp_path))
        assert (folder / MARK).exists() == runs


@pytest.mark.parametrize("name", [None, "MyTokenizer"])
def test_code_of_an_unknown_tokenizer_is_refused(folder: Path, name: str | None) -> None:
    """transformers would run it if told to trust, and there is no other way to be asked first."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    plant_code(folder)
    for auto in (AutoTokenizer, AutoModel, AutoConfig):
        with pytest.raises(UnsafeFileError, match="code of its own"):
            auto.from_pretrained(folder, trust_remote_code=True)
    assert not (folder / MARK).exists()
    assert glmquant.load(folder, device="cpu").dtype == torch.float16


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float32}, {"torch_dtype": "float32"}, {"torch_dtype": torch.float32, "device": "cpu"},
        {"device_map": "cpu", "dtype": "float32"}, {"device_map": {"": "cpu"}, "torch_dtype": torch.float32},
        {"dtype": "float32", "revision": "v1.0.0", "cache_dir": "x", "local_files_only": True, "empty_init": False,
         "low_cpu_mem_usage": True, "use_safetensors": True, "force_download": False, "token": None,
         "attn_implementation": "eager", "load_in_8bit": False},
    ],
    ids=lambda options: "-".join(options)[:40],
)  # fmt: skip
def test_common_options(folder: Path, options: dict[str, Any]) -> None:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(glmquant.load(folder, device="cpu", dtype="float32")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_4bit": True}, ("load_in_4bit", "quantize(4)")),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ("quantization_config", "quantize(4)")),
        ({"output_loading_info": True}, ("output_loading_info",)),
        ({"device": "cpu", "device_map": "auto"}, ("contradict",)),
        ({"num_layers": 1}, ("num_layers", "config.json")),
        ({"pre_seq_len": 128}, ("pre_seq_len",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_would_be_without_effect(
    folder: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("quantization_config", "x"), ("torch_dtype", "foo"), ("eos_token_id", "2"), ("rope_ratio", "a")],
)
@pytest.mark.filterwarnings("ignore")
def test_a_bad_value_in_config_json_is_told_in_our_words(folder: Path, field: str, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(SourceError, match=field) as caught:
        AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("section", [[], 0, False, {}, None], ids=str)
def test_no_quantization_in_any_spelling(folder: Path, section: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
    assert AutoModel.from_pretrained(folder).quantized_bits is None


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["foo", "int8", 5], ids=str)
def test_a_dtype_that_is_none(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=repr(value)):
        AutoModel.from_pretrained(folder, **{name: value})


@pytest.mark.parametrize("tiny", ["chatglm-6b/tiny-3l", "chatglm2-6b/tiny/bin-fp16"])
def test_from_config_gives_random_weights(tiny: str) -> None:
    config = AutoConfig.from_pretrained(golden(tiny))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stored = glmquant.load(golden(tiny), device="cpu", dtype="bfloat16")
    shapes = {name: weight.shape for name, weight in stored.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert (type(model), model.dtype) == (type(stored), torch.bfloat16)
    assert model.get_input_embeddings().weight.std() > 0
    config.quantization_bit = 4
    with pytest.raises(UsageError, match="from_pretrained"):
        AutoModel.from_config(config)


def test_a_configuration_may_be_passed_but_not_changed(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
    config.pre_seq_len = 128
    with pytest.raises(UsageError, match="P-tuning"):
        AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)


def test_damage_is_told_in_our_words(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="holds no weights"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_native_folders_of_others_stay_with_stock_transformers(folder: Path, tmp_path: Path) -> None:
    glmquant.convert(folder, tmp_path / "native", Recipe(bits=16))
    (tmp_path / "native" / REPORT).unlink()
    for auto, name in ((AutoModel, "GlmModel"), (AutoModelForCausalLM, "GlmForCausalLM")):
        model = auto.from_pretrained(tmp_path / "native")
        assert type(model).__module__ == "transformers.models.glm.modeling_glm"
        assert type(model).__name__ == name
        assert type(auto.from_config(model.config)) is type(model)
    # Not the same bits: in half precision, our attention and output head round less often than torch's.
    torch.testing.assert_close(
        logits(model), logits(glmquant.load(tmp_path / "native", device="cpu")), atol=2e-4, rtol=1e-2
    )


def test_packed_original_folders(folder: Path, tmp_path: Path) -> None:
    """ChatGLM's names with compressed-tensors' weights, as for vLLM and SGLang."""
    glmquant.convert(folder, tmp_path / "out", Recipe(group_size=64, layout="original"))
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.quantized_bits == 4
    assert torch.equal(logits(model), logits(glmquant.load(tmp_path / "out", device="cpu")))


def test_the_folder_of_an_adapter_loads_with_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    train(skeleton(original_weights()), lora(), adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(folder)})
    )
    wanted = logits(glmquant.load(folder, device="cpu", adapter=adapter))
    assert torch.equal(logits(AutoModel.from_pretrained(adapter, trust_remote_code=True)), wanted)
    assert not torch.equal(logits(AutoModel.from_pretrained(folder, trust_remote_code=True)), wanted)


@pytest.mark.parametrize("model", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_the_tokenizer_of_a_folder_without_tokenizer_config(tmp_path: Path, model: str) -> None:
    """config.json and the vocabulary are enough to tell it, as for `load_tokenizer`."""
    folder = published(tmp_path, model)
    text = "Hello 你好\n"
    wanted = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    (folder / "tokenizer_config.json").write_text("{}")
    for _ in range(2):
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert (type(found), found(text)["input_ids"]) == (type(wanted), wanted(text)["input_ids"])
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    AutoModel.from_pretrained(folder, config=AutoConfig.from_pretrained(folder))
    for vocabulary in ("ice_text.model", "tokenizer.model"):
        (folder / vocabulary).unlink(missing_ok=True)
    with pytest.raises(SourceError, match="no tokenizer that is known here"):
        AutoTokenizer.from_pretrained(folder)
    AutoModel.from_pretrained(folder)
    assert not (folder / MARK).exists()


@pytest.mark.parametrize("model", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_a_saved_tokenizer_is_found_again(tmp_path: Path, model: str) -> None:
    folder = published(tmp_path, model)
    saved = glmquant.load_tokenizer(folder)
    saved.save_pretrained(folder)
    assert type(AutoTokenizer.from_pretrained(folder)) is type(saved)


def test_a_tokenizer_of_another_model_is_not_guessed_at(tmp_path: Path) -> None:
    folder = published(tmp_path, "chatglm3-6b")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(SourceError, match="'LlamaTokenizer', which is none of ChatGLM's"):
        AutoTokenizer.from_pretrained(folder)
    AutoModel.from_pretrained(folder)
