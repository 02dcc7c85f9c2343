"""ChatGLM-6B, the first generation: multi-head attention, LayerNorm, biases everywhere, tied head.

No other library's model computes it, so its only layout is the original one.
"""

from __future__ import annotations

from .base import Config, Dims, Family, Role, TensorRule, per_layer


def _dims(config: Config) -> Dims:
    heads = config["num_attention_heads"]
    return Dims(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        ffn=config["inner_hidden_size"],
        vocab=config["vocab_size"],
        context=config["max_sequence_length"],
        tied_head=config.get("tie_word_embeddings", True),
    )


def _describe(config: Config) -> str:
    first = config["vocab_size"] >= 150528  # image tokens in front of the text, bos 150004
    return "ChatGLM-6B (first release)" if first else "ChatGLM-6B"


FAMILY = Family(
    name="chatglm",
    layouts=("original",),
    read_dims=_dims,
    describe=_describe,
    unsupported={"position_encoding_2d": True},
    folds_norms=False,  # the residual stream takes what they give, too
    rules=(
        TensorRule("transformer.word_embeddings.weight", ("vocab", "hidden"), Role.EMBEDDING),
        *per_layer(
            "transformer.layers.{layer}.",
            (
                TensorRule("input_layernorm.weight", ("hidden",), Role.NORM),
                TensorRule("input_layernorm.bias", ("hidden",), Role.NORM),
                TensorRule("attention.rotary_emb.inv_freq", ("rotary",), Role.BUFFER, optional=True),
                TensorRule(
                    "attention.query_key_value.weight",
                    ("qkv", "hidden"),
                    Role.LINEAR,
                    behind="input_layernorm.weight",
                ),
                TensorRule("attention.query_key_value.bias", ("qkv",), Role.BIAS),
                TensorRule("attention.dense.weight", ("hidden", "hidden"), Role.LINEAR),
                TensorRule("attention.dense.bias", ("hidden",), Role.BIAS),
                TensorRule("post_attention_layernorm.weight", ("hidden",), Role.NORM),
                TensorRule("post_attention_layernorm.bias", ("hidden",), Role.NORM),
                TensorRule(
                    "mlp.dense_h_to_4h.weight",
                    ("ffn", "hidden"),
                    Role.LINEAR,
                    behind="post_attention_layernorm.weight",
                ),
                TensorRule("mlp.dense_h_to_4h.bias", ("ffn",), Role.BIAS),
                TensorRule("mlp.dense_4h_to_h.weight", ("hidden", "ffn"), Role.LINEAR),
                TensorRule("mlp.dense_4h_to_h.bias", ("hidden",), Role.BIAS),
            ),
        ),
        TensorRule("transformer.final_layernorm.weight", ("hidden",), Role.NORM),
        TensorRule("transformer.final_layernorm.bias", ("hidden",), Role.NORM),
        TensorRule("lm_head.weight", ("vocab", "hidden"), Role.HEAD),
    ),
)
