"""transformers-native ``glm`` (GLM-4-9B-hf and what `convert` writes) and ``glm4`` (GLM-4-0414).

``glm4`` differs by two more norms in each layer. Both are native already: names map to themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import Config, Dims, Family, Role, TensorRule, per_layer


def _dims(config: Config) -> Dims:
    # What GlmConfig and Glm4Config assume where config.json is silent: kv_heads, head_dim, qkv_bias.
    return Dims(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads", 2),
        head_dim=config.get("head_dim", 128),
        ffn=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        qkv_bias=config.get("attention_bias", True),
        tied_head=config.get("tie_word_embeddings", False),
    )


def _native_config(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "auto_map"}


def _same(name: str, rows: str, *columns: str, role: Role, **more: Any) -> TensorRule:
    return TensorRule(name, (rows, *columns), role, native=((name, rows),), **more)


def _rules(extra_norms: tuple[str, ...]) -> tuple[TensorRule, ...]:
    projections = (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv"))
    layer = (
        _same("input_layernorm.weight", "hidden", role=Role.NORM),
        *(
            _same(
                f"self_attn.{n}.weight",
                r,
                "hidden",
                role=Role.LINEAR,
                unit="qkv",
                behind="input_layernorm.weight",
            )
            for n, r in projections
        ),
        *(_same(f"self_attn.{n}.bias", r, role=Role.BIAS, when="qkv_bias") for n, r in projections),
        _same(
            "self_attn.o_proj.weight", "hidden", "q", role=Role.LINEAR, fed=("self_attn.v_proj.weight", "kv")
        ),
        _same("post_attention_layernorm.weight", "hidden", role=Role.NORM),
        *(_same(f"{n}.weight", "hidden", role=Role.NORM) for n in extra_norms),
        _same(
            "mlp.gate_up_proj.weight",
            "2ffn",
            "hidden",
            role=Role.LINEAR,
            behind="post_attention_layernorm.weight",
        ),
        _same(
            "mlp.down_proj.weight", "hidden", "ffn", role=Role.LINEAR, fed=("mlp.gate_up_proj.weight", "ffn")
        ),
    )
    prefix = "model.layers.{layer}."
    return (
        _same("model.embed_tokens.weight", "vocab", "hidden", role=Role.EMBEDDING),
        *(
            replace(rule, native=tuple((prefix + name, rows) for name, rows in rule.native))
            for rule in per_layer(prefix, layer)
        ),
        _same("model.norm.weight", "hidden", role=Role.NORM),
        _same("lm_head.weight", "vocab", "hidden", role=Role.HEAD),
    )


def _describe(config: Config) -> str:
    known = {151552: "GLM-4-9B", 65024: "ChatGLM2-6B or ChatGLM3-6B"}
    return known.get(config["vocab_size"], "a model of the GLM-4-9B architecture")


FAMILY = Family(
    name="glm",
    layouts=("native",),
    read_dims=_dims,
    describe=_describe,
    native_config=_native_config,
    rules=_rules(()),
)

FAMILY_GLM4 = Family(
    name="glm4",
    layouts=("native",),
    read_dims=_dims,
    describe=lambda config: "GLM-4-0414",
    native_config=_native_config,
    rules=_rules(("post_self_attn_layernorm", "post_mlp_layernorm")),
)
