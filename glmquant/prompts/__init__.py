"""How each generation is talked to: ids for a conversation, defaults of sampling, what to make of an answer.

::

    prompt = prompt_for(tokenizer)
    history = prompt.history(None)
    ids = prompt.ids("你好", history)
    response, history = prompt.reply(prompt.decode(answer), "你好", history)
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..tokenizers.kind import Kind
from .base import History, Message, MessagePrompt, Prompt, Response, Sampling, Turn, token_id
from .chatglm import ChatGLMPrompt
from .chatglm2 import ChatGLM2Prompt
from .chatglm3 import ChatGLM3Prompt
from .glm4 import GLM4Prompt
from .template import TemplatePrompt

__all__ = [
    "PROMPTS",
    "ChatGLM2Prompt",
    "ChatGLM3Prompt",
    "ChatGLMPrompt",
    "GLM4Prompt",
    "History",
    "Message",
    "Prompt",
    "Response",
    "Sampling",
    "TemplatePrompt",
    "Turn",
    "prompt_for",
]

PROMPTS: dict[Kind, type[Prompt]] = {
    "chatglm": ChatGLMPrompt,
    "chatglm2": ChatGLM2Prompt,
    "chatglm3": ChatGLM3Prompt,
    "glm4": GLM4Prompt,
}

# Tokens that only one generation's vocabulary has all of; the first that fits.
_MARKS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("glm4", ("<|endoftext|>", "<sop>", "<|user|>")),
    ("chatglm3", ("[gMASK]", "sop", "<|user|>")),
    ("chatglm2", ("[gMASK]", "sop", "eop")),
    ("chatglm", ("[gMASK]", "<sop>", "<eop>")),
)

# A conversation with all that sets one chat template apart from another.
_TOOL = {"type": "function", "function": {"name": "a", "description": "b", "parameters": {}}}
_SAMPLE: list[Message] = [
    {"role": "system", "content": "c", "tools": [_TOOL]},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
    {"role": "user", "content": "f"},
]


def prompt_for(tokenizer: Any, *, encode_special_tokens: bool = False) -> Prompt:
    """The prompt format that belongs to a tokenizer.

    Args:
        tokenizer: one of ours, or a fast tokenizer, which is told by its special tokens. Later models share
            GLM-4's tokens and talk differently: a chat template that says something else than the generation's
            format is followed.
        encode_special_tokens: see `Prompt`.

    Raises:
        UsageError: it is none of ChatGLM's or GLM-4's, and has no chat template either.
    """
    kind = getattr(tokenizer, "kind", None)
    if kind not in PROMPTS:
        kind = _kind_by_tokens(tokenizer)
    if kind is not None:
        return PROMPTS[kind](tokenizer, encode_special_tokens=encode_special_tokens)
    if getattr(tokenizer, "chat_template", None):
        return TemplatePrompt(tokenizer)
    raise UsageError(
        f"{type(tokenizer).__name__} is not a tokenizer of ChatGLM-6B, ChatGLM2, ChatGLM3 or GLM-4, and has no "
        "chat template; pass what glmquant.load_tokenizer returns for the model's folder."
    )


def _kind_by_tokens(tokenizer: Any) -> Kind | None:
    """The generation of a fast tokenizer; None where its chat template is not that of the generation."""
    for kind, tokens in _MARKS:
        if all(token_id(tokenizer, token) is not None for token in tokens):
            return kind if _agrees(PROMPTS[kind](tokenizer)) else None
    return None


def _agrees(prompt: Prompt) -> bool:
    """Whether the tokenizer has no chat template, or one that gives the ids of `prompt`."""
    tokenizer = prompt.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return True
    messages = _SAMPLE if isinstance(prompt, MessagePrompt) else _SAMPLE[1:]
    try:
        ids = prompt.ids(messages[-1]["content"], prompt.history(messages[:-1]))
        said = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception:  # templates raise what they like
        return False
    return list(said) == ids
