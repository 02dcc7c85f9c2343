"""What `glmquant.load` refuses, and what it leaves alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cards import offline, published
from helpers_models import golden
from helpers_sources import CHATGLM, CHATGLM2, DOWN, HEAD, NORM, random_tensors, tiny_model, write_model
from safetensors.torch import load_file, save_file

import glmquant
from glmquant import GlmquantError, QuantizedSourceError, Recipe, SourceError, UnsafeFileError, UsageError


def refused(folder: Path, *words: str, error: type[GlmquantError] = SourceError, **options: Any) -> str:
    """Load, and expect one sentence that says each of `words`."""
    with pytest.raises(error) as caught:
        glmquant.load(folder, **{"device": "cpu", **options})
    message = str(caught.value)
    assert type(caught.value) is error, message
    for word in words:
        assert word in message, message
    assert "\n" not in message
    assert len(message) < 600
    return message


def rewrite_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_missing_and_foreign_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    refused(tiny_model(tmp_path / "a", **{DOWN: None}), DOWN, "lacks")
    refused(
        tiny_model(tmp_path / "b", **{"transformer.extra.weight": torch.zeros(2)}), "transformer.extra.weight"
    )
    refused(tiny_model(tmp_path / "c", **{NORM: torch.zeros(5)}), NORM, "[5]", "[128]")
    refused(tiny_model(tmp_path / "d", **{HEAD: torch.zeros(97, 128)}), HEAD, "[97, 128]")


def test_stored_rotary_frequencies_are_not_read(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM2)
    name = "transformer.rotary_pos_emb.inv_freq"
    plain = {n: t for n, t in tensors.items() if n != name}
    models = []
    for number, weights in enumerate((plain, {**plain, name: torch.full((16,), 9.0)})):
        models.append(glmquant.load(write_model(tmp_path / str(number), CHATGLM2, weights), device="cpu"))
    ids = torch.arange(9)[None]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_quantization_that_is_not_known_is_never_ignored(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    for section in ({"quant_method": "awq"}, {"load_in_4bit": True}, "int4", ["x"]):
        refused(rewrite_config(folder, quantization_config=section), "quantized", error=QuantizedSourceError)
    rewrite_config(folder, quantization_config=None)
    refused(rewrite_config(folder, quantization_bit=4), "do not belong together")
    refused(rewrite_config(folder, quantization_bit=2), "quantization_bit 2")


def test_quantized_weights_without_a_word_in_config_json(tmp_path: Path) -> None:
    folder = golden("chatglm2-6b/tiny-int8", "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_bit"]
    write_model(tmp_path / "m", config, load_file(folder / "model.safetensors"))
    refused(tmp_path / "m", "I8", "quantized")


def test_a_packed_tensor_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    glmquant.convert(tiny_model(tmp_path), tmp_path / "out", Recipe(group_size=64))
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:, :2].contiguous()}, file)
    refused(tmp_path / "out", name)
    del tensors[name]
    save_file(tensors, file)
    refused(tmp_path / "out", name)


def test_a_trained_head_is_not_dropped_for_a_tied_one(tmp_path: Path) -> None:
    tensors = random_tensors(CHATGLM)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    config = {**CHATGLM, "bos_token_id": 90, "eos_token_id": 91}
    folder = write_model(tmp_path / "m", config, tensors)
    assert glmquant.load(folder, device="cpu").lm_head.weight.shape == (96, 64)
    tensors["lm_head.weight"][95, 63] += 1
    write_model(folder, config, tensors)
    refused(folder, "lm_head.weight", "tie_word_embeddings")
    rewrite_config(folder, tie_word_embeddings=False)
    assert torch.equal(glmquant.load(folder, device="cpu").lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "what"}, "what"),
        ({"device": "quantum"}, "quantum"),
        ({"device_map": "disk-please"}, "disk-please"),
        ({"device": "cpu", "device_map": "auto"}, "contradict"),
        ({"device": "auto", "device_map": {"model": "cpu"}}, "every layer"),
        ({"device": "auto", "device_map": {"": "disk"}}, "offload_folder"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], word: str) -> None:
    if "device_map" in options:
        options = {"device": "auto", **options}
    refused(tiny_model(tmp_path), word, error=UsageError, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    refused(tiny_model(tmp_path), "cuda", error=UsageError, device="cuda")
    assert glmquant.load(tmp_path / "model", device="auto").device.type == "cpu"


def test_a_bad_generation_config(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    (folder / "generation_config.json").write_text("{")
    refused(folder, "generation_config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("torch_dtype", "int8"), ("torch_dtype", "foo"), ("dtype", "float64"), ("torch_dtype", 5),
        ("rope_ratio", "a"), ("eos_token_id", "2"), ("pad_token_id", [0]), ("attention_dropout", "x"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_of_the_field(tmp_path: Path, field: str, value: Any) -> None:
    folder = rewrite_config(tiny_model(tmp_path), **{field: value})
    message = refused(folder, f"gives {field} as {value!r}")
    assert "Error" not in message
    assert "multiply" not in message


def test_a_p_tuning_switch(tmp_path: Path) -> None:
    refused(rewrite_config(tiny_model(tmp_path), prefix_projection=True), "prefix_projection", "P-tuning")


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ({"bos_token_id": None}, "bos_token_id as None"),
        ({"bos_token_id": 96}, "bos_token_id as 96"),
        ({"bos_token_id": True}, "bos_token_id as True"),
        ({"bos_token_id": 91}, "eos_token_id as 91, which is bos_token_id"),
        ({"gmask_token_id": 96}, "gmask_token_id as 96; it must"),
        ({"gmask_token_id": 86}, "gmask_token_id as 86"),
        ({"mask_token_id": 87}, "mask_token_id as 87"),
    ],
)
def test_special_ids_by_which_chatglm_6b_computes(tmp_path: Path, ids: dict[str, Any], named: str) -> None:
    config = {**CHATGLM, "bos_token_id": 90, "eos_token_id": 91, "gmask_token_id": 87, "mask_token_id": 86}
    tensors = {name: t for name, t in random_tensors(CHATGLM).items() if name != "lm_head.weight"}
    folder = write_model(tmp_path / "m", config, tensors)
    assert glmquant.load(folder, device="cpu").config.bos_token_id == 90
    refused(rewrite_config(folder, **ids), named)


def test_a_configuration_that_transformers_refuses(tmp_path: Path) -> None:
    refused(rewrite_config(tiny_model(tmp_path), pad_token_id=5000), "config.json", "within")
    refused(
        rewrite_config(tmp_path / "model", pad_token_id=0), "attn_implementation", attn_implementation="guess"
    )


def test_nothing_that_is_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent")
    refused(tmp_path, "no weights")


def plant_code(folder: Path) -> Path:
    """Python files that would leave a mark, referred to as THUDM's config.json does."""
    mark = folder / "executed"
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_chatglm.py").write_text(f"open({str(mark)!r}, 'w')\nclass ChatGLM: pass\n")
    rewrite_config(
        folder, auto_map={"AutoModel": "modeling_chatglm.ChatGLM", "AutoConfig": "configuration_chatglm.X"}
    )
    return mark


# Before anything of ours is imported: what a process does that is told to the interpreter's own hooks.
WATCHED = """
import os, sys, types
FOLDER = {folder!r}
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.utime", "os.chmod", "os.symlink", "os.link")
def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        os.write(2, f"NETWORK {{event}} {{arguments}}\\n".encode())
    first = arguments[0] if arguments else None
    first = first.co_filename if isinstance(first, types.CodeType) else first
    path = os.path.abspath(os.fsdecode(first)) if isinstance(first, (str, bytes, os.PathLike)) else ""
    if event in ("exec", "compile", "import", "ctypes.dlopen"):  # the second: where transformers copies code to
        named = [path, *(a for a in arguments if isinstance(a, str))]
        if any(FOLDER + os.sep in n or "transformers_modules" in n for n in named):
            os.write(2, f"RAN {{event}} {{named}}\\n".encode())
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if path.startswith(FOLDER + os.sep) and (writes or event in CHANGES):
        os.write(2, f"TOUCHED {{event}} {{arguments}}\\n".encode())
sys.addaudithook(watch)
import glmquant
"""


@pytest.mark.parametrize("call", ["load", "load_tokenizer"])
def test_no_code_of_the_folder_is_run_nothing_written_there_and_nobody_asked(
    tmp_path: Path, call: str
) -> None:
    folder = published(tmp_path, "chatglm3-6b")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    options = ", device='cpu'" if call == "load" else ""
    program = WATCHED.format(folder=str(folder)) + f"glmquant.{call}({str(folder)!r}{options})\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, env=offline(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith(("NETWORK", "TOUCHED", "RAN"))]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("open(FOLDER + '/new', 'w')", "TOUCHED open"),
        ("sys.path.insert(0, FOLDER); import modeling_chatglm", "RAN exec"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "NETWORK socket.connect"),
        ("import socket; socket.getaddrinfo('localhost', 9)", "NETWORK socket.getaddrinfo"),
    ],
)
def test_the_watch_sees_what_it_is_for(tmp_path: Path, harm: str, told: str) -> None:
    folder = published(tmp_path, "chatglm3-6b")
    program = WATCHED.format(folder=str(folder)).replace("import glmquant", harm)
    environment = {k: v for k, v in offline(tmp_path).items() if not k.endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment
    )
    assert told in done.stderr


class Danger:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


def test_a_pickle_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CHATGLM2))
    torch.save({**random_tensors(CHATGLM2), "x": Danger()}, folder / "pytorch_model.bin")
    refused(folder, "nothing in it was run", error=UnsafeFileError)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "cpm"])
def test_the_files_may_be_replaced_afterwards(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "m"
    config, tensors = CHATGLM2, random_tensors(CHATGLM2)
    if kind == "cpm":
        glmquant.convert(write_model(tmp_path / "s", config, tensors), folder, Recipe(bits=8, format="cpm"))
    elif kind == "bin":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        write_model(folder, {**config, "torch_dtype": "float16"}, tensors)
    model = glmquant.load(folder, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert str(folder) not in Path("/proc/self/maps").read_text()
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".bin"):
            path.write_bytes(b"\0" * path.stat().st_size)  # in place, as a careless download does
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
