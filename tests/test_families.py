"""Families against the names and shapes of the real checkpoints, and plans at full size without a weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers_sources import CHATGLM, CHATGLM2, HEADERS, Header, nbytes
from transformers import AutoModelForCausalLM, GlmConfig

from glmquant import families
from glmquant.errors import SourceError
from glmquant.families import Role

FAMILY_OF = {
    "chatglm-6b": "chatglm",
    "chatglm-6b-2023-03": "chatglm",
    "chatglm2-6b": "chatglm2",
    "chatglm3-6b": "chatglm2",
    "chatglm3-6b-32k": "chatglm2",
    "glm-4-9b-chat": "chatglm2",
    "glm-4-9b-hf": "glm",
    "glm-4-9b-0414": "glm4",
}
WITH_NATIVE = [name for name, family in FAMILY_OF.items() if family != "chatglm"]
GLM: dict[str, Any] = {
    "model_type": "glm",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


def test_every_fixture_is_expected() -> None:
    assert set(HEADERS) == set(FAMILY_OF)


@pytest.mark.parametrize("name", HEADERS)
def test_names_and_shapes_are_those_of_the_real_checkpoint(name: str) -> None:
    header = Header.load(name)
    family = families.detect(header.config)
    assert family.name == FAMILY_OF[name]
    specs = list(family.tensors(family.dims(header.config)))
    assert len({spec.name for spec in specs}) == len(specs)
    assert {s.name: s.shape for s in specs} == {n: shape for n, (_, shape) in header.tensors.items()}
    stored_bytes = sum(nbytes(header.tensors[s.name][0], s.shape) for s in specs)
    assert stored_bytes == header.total_size


@pytest.mark.parametrize("name", HEADERS)
def test_only_what_the_original_code_does_without_is_optional(name: str) -> None:
    header = Header.load(name)
    family = families.detect(header.config)
    optional = {s.name for s in family.tensors(family.dims(header.config)) if s.optional}
    tied = {"lm_head.weight"} if family.name == "chatglm" else set()
    assert optional == {n for n in header.tensors if n.endswith("inv_freq")} | tied


@pytest.mark.parametrize("name", HEADERS)
def test_every_matrix_has_the_role_its_name_says(name: str) -> None:
    header = Header.load(name)
    family = families.detect(header.config)
    for spec in family.tensors(family.dims(header.config)):
        if len(spec.shape) == 2:
            expected = Role.LINEAR
            if "embed" in spec.name:
                expected = Role.EMBEDDING
            elif spec.name.startswith(("lm_head", "transformer.output_layer")):
                expected = Role.HEAD
        elif spec.name.endswith("inv_freq"):
            expected = Role.BUFFER
        else:
            expected = Role.NORM if "norm" in spec.name else Role.BIAS
        assert spec.role is expected, spec.name
        layer = spec.name.split(".layers.")[1].split(".")[0] if ".layers." in spec.name else None
        assert spec.layer == (None if layer is None else int(layer))


@pytest.mark.parametrize("name", HEADERS)
def test_tensors_come_in_the_order_of_the_data(name: str) -> None:
    header = Header.load(name)
    family = families.detect(header.config)
    specs = list(family.tensors(family.dims(header.config)))
    assert specs[0].role is Role.EMBEDDING
    assert specs[-1].role is Role.HEAD
    layers = [s.layer for s in specs if s.layer is not None]
    assert layers == sorted(layers)


def meta_model(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model that transformers itself builds from a native ``config.json``."""
    loaded = GlmConfig.from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded)
    assert type(model).__name__ == "GlmForCausalLM"
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", [n for n in WITH_NATIVE if FAMILY_OF[n] == "chatglm2"])
def test_native_names_are_those_of_transformers(name: str) -> None:
    config = Header.load(name).config
    family = families.detect(config)
    assert family.native_config is not None
    native = {t.name: t.shape for t in family.in_layout(family.dims(config), "native")}
    assert native == meta_model(family.native_config(config))


@pytest.mark.parametrize("name", WITH_NATIVE)
def test_the_native_layout_uses_every_row_once(name: str) -> None:
    header = Header.load(name)
    family = families.detect(header.config)
    dims = family.dims(header.config)
    used: dict[str, list[tuple[int, int]]] = {}
    for tensor in family.in_layout(dims, "native"):
        assert tensor.shape == (tensor.stop - tensor.start, *header.tensors[tensor.source][1][1:])
        used.setdefault(tensor.source, []).append((tensor.start, tensor.stop))
    for source, (_, shape) in header.tensors.items():
        if source.endswith("inv_freq"):
            assert source not in used
            continue
        bounds = [0, *(stop for _, stop in used[source])]
        assert used[source] == list(itertools.pairwise(bounds)), source
        assert bounds[-1] == shape[0]


def test_fused_attention_is_split_into_q_k_and_v_in_this_order() -> None:
    config = Header.load("chatglm3-6b").config
    family = families.detect(config)
    split = [
        (t.name.removeprefix("model.layers.27.self_attn."), t.start, t.stop)
        for t in family.in_layout(family.dims(config), "native")
        if t.source == "transformer.encoder.layers.27.self_attention.query_key_value.weight"
    ]
    assert split == [
        ("q_proj.weight", 0, 4096),
        ("k_proj.weight", 4096, 4352),
        ("v_proj.weight", 4352, 4608),
    ]


@pytest.mark.parametrize(
    ("name", "ratio", "eps", "context"),
    [
        ("chatglm2-6b", 1, 1e-5, 32768),
        ("chatglm3-6b", 1, 1e-5, 8192),
        ("chatglm3-6b-32k", 50, 1e-5, 32768),
        ("glm-4-9b-chat", 500, 1.5625e-07, 131072),
    ],
)
def test_the_native_config_is_what_transformers_computes_with(
    name: str, ratio: int, eps: float, context: int
) -> None:
    source = Header.load(name).config
    family = families.detect(source)
    assert family.native_config is not None
    native = family.native_config(source)
    config = GlmConfig.from_dict(native)
    assert config.model_type == "glm"
    assert config.rope_parameters["rope_theta"] == 10000 * ratio
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_type"] == "default"
    # transformers 4 and other engines read these instead
    assert native["rope_theta"] == 10000 * ratio
    assert native["partial_rotary_factor"] == 0.5
    assert config.rms_norm_eps == eps
    assert config.max_position_embeddings == context
    assert config.head_dim == source["kv_channels"]
    assert config.num_key_value_heads == source["multi_query_group_num"]
    assert config.attention_bias is True
    assert config.tie_word_embeddings is False
    assert config.hidden_act == "silu"
    assert config.eos_token_id == source["eos_token_id"]
    assert config.pad_token_id == source["pad_token_id"]
    assert str(config.dtype) == f"torch.{source['torch_dtype']}"
    assert "auto_map" not in native


@pytest.mark.parametrize("name", ["glm-4-9b-hf", "glm-4-9b-0414"])
def test_a_native_config_stays_as_it_is_but_runs_no_code(name: str) -> None:
    config = Header.load(name).config
    family = families.detect(config)
    assert family.native_config is not None
    assert family.native_config({**config, "auto_map": {"AutoModel": "evil.Model"}}) == config


def test_what_a_native_config_leaves_out_is_what_transformers_assumes() -> None:
    dims = families.detect(GLM).dims(GLM)
    assumed = GlmConfig.from_dict(GLM)
    assert dims.kv_heads == assumed.num_key_value_heads
    assert dims.head_dim == assumed.head_dim
    assert dims.qkv_bias == assumed.attention_bias
    assert dims.tied_head == assumed.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("chatglm-6b", "ChatGLM-6B"),
        ("chatglm-6b-2023-03", "ChatGLM-6B (first release)"),
        ("chatglm2-6b", "ChatGLM2-6B"),
        ("chatglm3-6b", "ChatGLM3-6B"),
        ("chatglm3-6b-32k", "ChatGLM3-6B-32K"),
        ("glm-4-9b-chat", "GLM-4-9B-chat"),
        ("glm-4-9b-hf", "GLM-4-9B"),
        ("glm-4-9b-0414", "GLM-4-0414"),
    ],
)
def test_models_are_called_what_people_call_them(name: str, described: str) -> None:
    config = Header.load(name).config
    assert families.detect(config).describe(config) == described


# What is refused.


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama'.*LlamaForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "no model_type.*GPT2LMHeadModel"),
        ({}, "no model_type"),
        ({"model_type": ["glm"]}, "glm"),
    ],
    ids=["llama", "no-model-type", "empty", "not-a-string"],
)
def test_an_unknown_architecture_is_named_beside_the_known_ones(config: Any, found: str) -> None:
    with pytest.raises(SourceError, match=f"unknown architecture.*{found}") as caught:
        families.detect(config)
    for known in ("ChatGLM-6B", "ChatGLM2-6B", "ChatGLM3-6B", "GLM-4-9B-chat", "glm4"):
        assert known in str(caught.value)


def test_a_chatglm_of_no_known_generation_says_which_fields_tell_them_apart() -> None:
    with pytest.raises(SourceError, match=r"inner_hidden_size.*padded_vocab_size"):
        families.detect({"model_type": "chatglm", "hidden_size": 4096})


@pytest.mark.parametrize(
    ("config", "switch", "value"),
    [
        (CHATGLM2, "add_bias_linear", True),
        (CHATGLM2, "apply_residual_connection_post_layernorm", True),
        (CHATGLM2, "fp32_residual_connection", True),
        (CHATGLM2, "original_rope", False),
        (CHATGLM2, "post_layer_norm", False),
        (CHATGLM2, "rmsnorm", False),
        (CHATGLM, "position_encoding_2d", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_switch_that_changes_the_computation_is_refused(
    config: dict[str, Any], switch: str, value: bool
) -> None:
    with pytest.raises(SourceError, match=f"sets {switch} to {value}"):
        families.detect(config).dims({**config, switch: value})


NEEDED = {
    "chatglm": (CHATGLM, "num_layers hidden_size num_attention_heads vocab_size max_sequence_length"),
    "chatglm2": (
        CHATGLM2,
        "num_layers hidden_size num_attention_heads kv_channels multi_query_group_num ffn_hidden_size "
        "seq_length layernorm_epsilon",
    ),
    "glm": (GLM, "num_hidden_layers hidden_size intermediate_size vocab_size max_position_embeddings"),
}
FIELDS = [(family, field) for family, (_, fields) in NEEDED.items() for field in fields.split()]


@pytest.mark.parametrize(("family", "field"), FIELDS)
def test_a_missing_field_is_named(family: str, field: str) -> None:
    config = {key: value for key, value in NEEDED[family][0].items() if key != field}
    with pytest.raises(SourceError, match=f"this {family} model lacks '{field}'"):
        families.detect(config).dims(config)


@pytest.mark.parametrize("value", [0, -1, None, "many", 1.5, [4]], ids=repr)
@pytest.mark.parametrize(("family", "field"), [f for f in FIELDS if f[1] != "layernorm_epsilon"])
def test_a_size_that_is_none_is_refused(family: str, field: str, value: Any) -> None:
    config = {**NEEDED[family][0], field: value}
    with pytest.raises(SourceError, match=r"config\.json"):
        families.detect(config).dims(config)


def test_heads_must_share_their_keys_evenly() -> None:
    with pytest.raises(SourceError, match="6 attention heads, which cannot share 4"):
        families.detect(CHATGLM2).dims({**CHATGLM2, "multi_query_group_num": 4})
