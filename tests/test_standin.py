"""The stand-in: a Llama in ChatGLM3's clothes computes what the Llama computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import standin
from benchmarks.standin import Format, Recipe, Variant

TRANSFORMERS_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
}
VARIANTS: list[Variant] = ["lean", "wide"]
FORMATS: list[Format] = ["safetensors", "bin"]


def as_glm(config: dict[str, Any], tensors: dict[str, Tensor]) -> GlmForCausalLM:
    """A ChatGLM3 checkpoint as transformers' own model: float32, renamed, query_key_value split."""
    head_dim, groups = config["kv_channels"], config["multi_query_group_num"]
    rows = [head_dim * n for n in (config["num_attention_heads"], groups, groups)]
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in TRANSFORMERS_NAMES.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for x, part in zip("qkv", torch.split(tensor.float(), rows), strict=True):
                renamed[name.replace("self_attention.query_key_value", f"self_attn.{x}_proj")] = part
        elif not name.endswith("inv_freq"):
            renamed[name] = tensor.float()
    glm = GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=config["layernorm_epsilon"],
        max_position_embeddings=config["seq_length"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["pad_token_id"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000 * config["rope_ratio"],
            "partial_rotary_factor": 0.5,
        },
    )
    model, report = GlmForCausalLM.from_pretrained(
        None, config=glm, state_dict=renamed, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and every tensor of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return json.loads((folder / "config.json").read_text()), tensors


def tiny_llama(hidden: int, tied: bool) -> LlamaForCausalLM:
    """Two random layers, with gains, eps and rope base that matter."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def paired_weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights with q and k rows in pairs (2j, 2j + 1)."""
    return {
        name: standin.interleave_rotary_rows(tensor, model.config.head_dim)
        if "q_proj" in name or "k_proj" in name
        else tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("hidden", [64, 80], ids=["hidden=heads*d", "hidden>heads*d"])
@pytest.mark.parametrize("basis_change", [False, True], ids=["same-basis", "basis-change"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_the_llamas(variant: Variant, basis_change: bool, hidden: int, tied: bool) -> None:
    llama = tiny_llama(hidden, tied)
    dressed = dict(standin.dress(paired_weights(llama).__getitem__, llama.config, variant, basis_change))
    glm = as_glm(standin.chatglm3_config(llama.config, variant), dressed)
    tokens = torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = llama(tokens).logits
    assert expected.std() > 1  # else agreement would mean little
    torch.testing.assert_close(glm(tokens).logits, expected, atol=1e-4, rtol=0)


def test_a_stream_that_cannot_hold_the_llama_is_refused() -> None:
    llama = LlamaConfig(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="32 wide in all, narrower than hidden 64"):
        standin.stream_map(llama, "wide", basis_change=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_changed_basis_is_fixed_dense_and_orthonormal(variant: Variant) -> None:
    config = tiny_llama(64, tied=True).config
    stream = standin.stream_map(config, variant, basis_change=True)
    assert stream.shape == (64 if variant == "lean" else 128, 64)
    torch.testing.assert_close(stream.T @ stream, torch.eye(64), atol=1e-6, rtol=0)
    assert (stream != 0).all()
    assert stream.equal(standin.stream_map(config, variant, basis_change=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_change_of_basis_leaves_no_gain(variant: Variant) -> None:
    llama = tiny_llama(64, tied=True)
    for name, tensor in standin.dress(paired_weights(llama).__getitem__, llama.config, variant, True):
        if "layernorm" in name:
            assert (tensor == 1).all(), name


def test_interleaving_puts_the_halves_of_each_head_side_by_side() -> None:
    rows = torch.arange(12).reshape(12, 1)  # two heads of six
    paired = standin.interleave_rotary_rows(rows, head_dim=6)
    assert paired.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_config_has_the_published_fields() -> None:
    published = Path(__file__).parent / "golden" / "chatglm3-6b" / "tiny" / "config.json"
    expected = json.loads(published.read_text()).keys() | {"_name_or_path", "rope_ratio"}
    config = standin.chatglm3_config(tiny_llama(64, tied=True).config, "wide")
    assert config.keys() | {"auto_map"} == expected | {"auto_map"}
    assert config["hidden_size"] == config["num_attention_heads"] * config["kv_channels"] == 128
    assert config["layernorm_epsilon"] == 0.005
    assert config["rope_ratio"] == 0.05


@pytest.mark.parametrize(
    ("sizes", "parts", "lengths"),
    [
        ([5, 5, 5, 5], 2, [2, 2]),
        ([1, 1, 1, 97], 2, [3, 1]),
        ([97, 1, 1, 1], 3, [1, 1, 2]),
        ([97, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([1, 1, 1, 97], 4, [1, 1, 1, 1]),
        ([3], 1, [1]),
    ],
)
def test_split_evenly(sizes: list[int], parts: int, lengths: list[int]) -> None:
    runs = [sizes[run] for run in standin.split_evenly(sizes, parts)]
    assert [size for run in runs for size in run] == sizes
    assert [len(run) for run in runs] == lengths
    assert len(runs) == parts


@pytest.mark.parametrize("parts", [-1, 0, 3])
def test_impossible_splits_are_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"2 tensors do not make {parts} shards: 1 to 2 do"):
        standin.split_evenly([1, 1], parts)


@pytest.mark.parametrize("format", FORMATS)
def test_shards_carry_thudms_names_and_an_index(tmp_path: Path, format: Format) -> None:
    tensors = {f"t{i}": torch.full((i + 1, 2), float(i)).half() for i in range(5)}
    standin.write_weights(tmp_path, tensors, Recipe(format=format, shards=3))
    stem = "model" if format == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{n}-of-00003.{format}" for n in (1, 2, 3)]
    index = json.loads((tmp_path / f"{stem}.{format}.index.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {*files, f"{stem}.{format}.index.json"}
    assert index["metadata"]["total_size"] == 2 * 2 * (1 + 2 + 3 + 4 + 5)
    for name, tensor in tensors.items():
        file = tmp_path / index["weight_map"][name]
        shard = load_file(file) if format == "safetensors" else torch.load(file, weights_only=True)
        assert shard[name].equal(tensor)


@pytest.mark.parametrize("format", FORMATS)
def test_one_shard_needs_no_index(tmp_path: Path, format: Format) -> None:
    standin.write_weights(tmp_path, {"t": torch.zeros(2)}, Recipe(format=format))
    name = "model.safetensors" if format == "safetensors" else "pytorch_model.bin"
    assert [file.name for file in tmp_path.iterdir()] == [name]


# The whole program, offline: a tiny GGUF file takes the place of SmolLM2's.


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A tiny Llama that lies in the cache as the wheel would."""
    model = tiny_llama(64, tied=True)
    monkeypatch.setenv("GLMQUANT_CACHE", str(tmp_path / "cache"))
    folder = standin.source_folder()
    for file in (standin.GGUF_FILE, standin.LICENSE_FILE):
        (folder / file).parent.mkdir(parents=True)
    (folder / standin.LICENSE_FILE).write_text("the licence\n")
    write_gguf(folder / standin.GGUF_FILE, model)
    return model


def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """Write the model as llama.cpp's converter does, with a vocabulary of characters."""
    config, vocabulary = model.config, ["<unk>", "<s>", "</s>", "Ġ", "ĠĠ", "it", *map(chr, range(33, 127))]
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["Ġ Ġ", "i t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in paired_weights(model).items():
        if name != "lm_head.weight":
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_built_folder_is_a_whole_chatglm3(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert standin.build(out, Recipe("wide", True, "bin", shards=2))
    config, tensors = load(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    tokens = torch.arange(40).reshape(1, 40)
    logits = as_glm(config, tensors)(tokens).logits
    torch.testing.assert_close(logits, llama(tokens).logits, atol=0.05, rtol=0)  # float16 weights
    assert (out / "LICENSE").read_text().endswith("the licence\n")
    assert "Apache-2.0" in (out / "LICENSE").read_text()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


@pytest.mark.usefixtures("llama")
def test_the_tokenizer_loads_and_cuts_numbers_into_digits(tmp_path: Path) -> None:
    standin.build(tmp_path / "out", Recipe())
    # The config names remote code, as the published ones do; the tokenizer needs none.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert tokenizer.tokenize("it  12</s>") == ["it", "ĠĠ", "1", "2", "</s>"]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"


@pytest.mark.usefixtures("llama")
def test_the_command_builds_once_and_replaces_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert standin.main([str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: ")
    assert standin.main([str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"already there: {out}: ")
    assert standin.main([str(out), "--variant", "wide"]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert standin.main([str(out), "--variant", "wide", "--force"]) == 0
    assert load(out)[0]["standin"]["variant"] == "wide"


def test_a_folder_of_something_else_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    assert standin.main([str(tmp_path), "--force"]) == 2
    assert "no stand-in" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.usefixtures("llama")
def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not make 1000 shards"):
        standin.build(tmp_path / "out", Recipe(shards=1000))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# The real thing.

needs_smollm2 = pytest.mark.skipif(
    not standin.source_folder().is_dir(),
    reason="SmolLM2 is not in the cache (python -m benchmarks.standin OUT downloads it)",
)


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [Recipe("lean"), Recipe("wide", True, "bin", 3)], ids=["lean", "wide-basis-change"]
)
@torch.no_grad()
def test_smollm2_speaks(tmp_path: Path, recipe: Recipe) -> None:
    standin.build(tmp_path / "out", recipe)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    model = as_glm(*load(tmp_path / "out"))
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False)
    continuation = tokenizer.decode(generated[0, prompt.shape[1] :])
    assert continuation.startswith(" Paris.")
    assert continuation == " Paris.\n\nThe answer is: 201"
