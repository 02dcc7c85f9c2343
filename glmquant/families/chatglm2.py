"""ChatGLM2-6B, ChatGLM3-6B, ChatGLM3-6B-32K and GLM-4-9B-chat: one architecture, four tokenizers.

transformers' own ``GlmForCausalLM`` computes it exactly once query_key_value is split and the tensors are
renamed; `native` in the table below is that renaming, and `_native_config` the configuration that goes with it.
"""

from __future__ import annotations

from typing import Any

from .base import Config, Dims, Family, Role, TensorRule, per_layer, stated_dtype

# What the configuration classes of the original code assume where config.json is silent.
_ROPE_BASE = 10000.0
# With this many rows of the embedding the role tokens of ChatGLM3 exist; beyond the tokenizer's they are padding.
_CHATGLM3_ROWS = 65024
_CHATGLM3_STOPS = (2, 64795, 64797)  # </s>, <|user|>, <|observation|>


def _dims(config: Config) -> Dims:
    heads = config["num_attention_heads"]
    multi_query = config.get("multi_query_attention", False)
    return Dims(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=config["multi_query_group_num"] if multi_query else heads,
        head_dim=config["kv_channels"],
        ffn=config["ffn_hidden_size"],
        vocab=config["padded_vocab_size"],
        context=config["seq_length"],
        qkv_bias=config.get("add_qkv_bias", False),
    )


def _describe(config: Config) -> str:
    if config["padded_vocab_size"] == 151552:
        return "GLM-4-9B-chat"
    if config["padded_vocab_size"] != 65024:
        return "a model of the ChatGLM2 architecture"
    if config.get("rope_ratio", 1) != 1:
        return "ChatGLM3-6B-32K"
    # Nothing but the sequence length (and the tokenizer) tells the second generation from the third.
    return "ChatGLM2-6B" if config["seq_length"] >= 32768 else "ChatGLM3-6B"


def _original_config(config: Config) -> dict[str, Any]:
    """What vLLM and SGLang look for."""
    return {"architectures": ["ChatGLMModel"], "original_rope": config.get("original_rope", True)}


def _stop_ids(config: Config, has_roles: bool) -> Any:
    """Those of config.json, and ChatGLM3's roles, which only its chat() knew."""
    stops = config.get("eos_token_id")
    if has_roles and config["padded_vocab_size"] == _CHATGLM3_ROWS and stops == 2:
        return list(_CHATGLM3_STOPS)
    return stops


def _native_config(config: Config) -> dict[str, Any]:
    dims = _dims(config)
    theta = _ROPE_BASE * config.get("rope_ratio", 1)
    native: dict[str, Any] = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": dims.qkv_bias,
        "attention_dropout": config.get("attention_dropout", 0.0),
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "max_position_embeddings": dims.context,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        # transformers 5 reads rope_parameters, transformers 4 and older engines the two plain keys
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "partial_rotary_factor": 0.5,
            "rope_theta": theta,
            "rope_type": "default",
        },
        "rope_theta": theta,
        "rms_norm_eps": config["layernorm_epsilon"],
        "tie_word_embeddings": False,
        "use_cache": config.get("use_cache", True),
        "vocab_size": dims.vocab,
    }
    native["torch_dtype"] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[stated_dtype(config)]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        native[key] = config.get(key)
    return native


_LAYER = "model.layers.{layer}."

FAMILY = Family(
    name="chatglm2",
    layouts=("native", "original"),
    read_dims=_dims,
    describe=_describe,
    native_config=_native_config,
    original_config=_original_config,
    stop_ids=_stop_ids,
    unsupported={
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "fp32_residual_connection": False,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
    },
    rules=(
        TensorRule(
            "transformer.embedding.word_embeddings.weight",
            ("vocab", "hidden"),
            Role.EMBEDDING,
            native=(("model.embed_tokens.weight", "vocab"),),
        ),
        *per_layer(
            "transformer.encoder.layers.{layer}.",
            (
                TensorRule(
                    "input_layernorm.weight",
                    ("hidden",),
                    Role.NORM,
                    native=((_LAYER + "input_layernorm.weight", "hidden"),),
                ),
                TensorRule(
                    "self_attention.query_key_value.weight",
                    ("qkv", "hidden"),
                    Role.LINEAR,
                    native=(
                        (_LAYER + "self_attn.q_proj.weight", "q"),
                        (_LAYER + "self_attn.k_proj.weight", "kv"),
                        (_LAYER + "self_attn.v_proj.weight", "kv"),
                    ),
                    behind="input_layernorm.weight",
                ),
                TensorRule(
                    "self_attention.query_key_value.bias",
                    ("qkv",),
                    Role.BIAS,
                    native=(
                        (_LAYER + "self_attn.q_proj.bias", "q"),
                        (_LAYER + "self_attn.k_proj.bias", "kv"),
                        (_LAYER + "self_attn.v_proj.bias", "kv"),
                    ),
                    when="qkv_bias",
                ),
                TensorRule(
                    "self_attention.dense.weight",
                    ("hidden", "q"),
                    Role.LINEAR,
                    native=((_LAYER + "self_attn.o_proj.weight", "hidden"),),
                    fed=("self_attention.query_key_value.weight", "kv"),
                ),
                TensorRule(
                    "post_attention_layernorm.weight",
                    ("hidden",),
                    Role.NORM,
                    native=((_LAYER + "post_attention_layernorm.weight", "hidden"),),
                ),
                TensorRule(
                    "mlp.dense_h_to_4h.weight",
                    ("2ffn", "hidden"),
                    Role.LINEAR,
                    native=((_LAYER + "mlp.gate_up_proj.weight", "2ffn"),),
                    behind="post_attention_layernorm.weight",
                ),
                TensorRule(
                    "mlp.dense_4h_to_h.weight",
                    ("hidden", "ffn"),
                    Role.LINEAR,
                    native=((_LAYER + "mlp.down_proj.weight", "hidden"),),
                    fed=("mlp.dense_h_to_4h.weight", "ffn"),
                ),
            ),
        ),
        TensorRule(
            "transformer.encoder.final_layernorm.weight",
            ("hidden",),
            Role.NORM,
            native=(("model.norm.weight", "hidden"),),
        ),
        TensorRule("transformer.rotary_pos_emb.inv_freq", ("rotary",), Role.BUFFER, optional=True),
        TensorRule(
            "transformer.output_layer.weight",
            ("vocab", "hidden"),
            Role.HEAD,
            native=(("lm_head.weight", "vocab"),),
        ),
    ),
)
