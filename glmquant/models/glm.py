"""transformers' own GLM models, which also compute ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B-chat, with a chat.

The classes keep the names of their bases: those are what ``save_pretrained`` writes into config.json, so that what
it writes loads in plain transformers.
"""

from __future__ import annotations

from transformers import Glm4Config, GlmConfig
from transformers.models.glm import modeling_glm as glm
from transformers.models.glm4 import modeling_glm4 as glm4

from .beside_chat import BesideChatMixin
from .chat import ChatMixin
from .decoding import DecodingMixin
from .quantized import CheckedEmbedding, OutputHead
from .runtime import PreciseRotary, RuntimeMixin


class GlmRotary(PreciseRotary, glm.GlmRotaryEmbedding):
    """See `PreciseRotary`."""


class Glm4Rotary(PreciseRotary, glm4.Glm4RotaryEmbedding):
    """See `PreciseRotary`."""


class GlmForCausalLM(ChatMixin, BesideChatMixin, RuntimeMixin, DecodingMixin, glm.GlmForCausalLM):
    """The architecture of ChatGLM2-6B, ChatGLM3-6B, ChatGLM3-6B-32K, GLM-4-9B-chat and GLM-4-9B-hf."""

    def __init__(self, config: GlmConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = GlmRotary(config)
        self.model.embed_tokens.__class__ = CheckedEmbedding
        self.lm_head.__class__ = OutputHead


class Glm4ForCausalLM(ChatMixin, BesideChatMixin, RuntimeMixin, glm4.Glm4ForCausalLM):
    """The architecture of GLM-4-0414."""

    def __init__(self, config: Glm4Config) -> None:
        super().__init__(config)
        self.model.rotary_emb = Glm4Rotary(config)
        self.model.embed_tokens.__class__ = CheckedEmbedding
        self.lm_head.__class__ = OutputHead
