"""What requests may hold. Fields that are not listed are ignored, as OpenAI-compatible servers do.

Fields that would change the answer and are not supported are listed, and refused unless they are neutral.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST_STOPS = 16
_SEED = 2**63

Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    """A call as a model wrote it; arguments are JSON in text."""

    name: str
    arguments: str = "{}"


class ToolCall(_Body):
    """See `FunctionCall`."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(_Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function", "observation"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(_Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s<>|]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    """See `Function`."""

    type: Literal["function"]
    function: Function


class StreamOptions(_Body):
    """What a stream tells besides."""

    include_usage: bool = False


class _Generation(_Body):
    """What all requests to OpenAI's addresses share."""

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: Penalty | None = None
    top_k: int | None = None
    min_p: float | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> _Generation:
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (1,), "logprobs": (False, 0), "logit_bias": ({},), "presence_penalty": (0,), "min_p": (0,),
            "frequency_penalty": (0,), "top_k": (-1, 0), **self._neutral(),
        }  # fmt: skip
        for name, values in neutral.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise ValueError(f"this server does not support {name}={value!r:.40}; leave it out")
        return self

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return {}

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    functions: list[Function] | None = None
    function_call: Literal["none", "auto"] | dict[str, Any] | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return {
            "top_logprobs": (0,), "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
        }  # fmt: skip

    @model_validator(mode="after")
    def _one_form(self) -> ChatRequest:
        if self.tools and self.functions:
            raise ValueError("give tools, or the older functions, not both")
        return self

    @property
    def offered(self) -> list[Function]:
        """The functions that the model is told of."""
        if self.functions:
            return [] if self.function_call == "none" else self.functions
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]


class CompletionRequest(_Generation):
    """``POST /v1/completions``; the prompt is text, or ids."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[int], Field(min_length=1)]
    )
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def _neutral(self) -> dict[str, tuple[Any, ...]]:
        return {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[row for row in self.prompt if isinstance(row, int)]]
        return [text for text in self.prompt if isinstance(text, str)]


class ClassicRequest(_Body):
    """``POST /`` of THUDM's servers for ChatGLM-6B and ChatGLM2-6B."""

    prompt: str
    history: list[tuple[str | None, str | None]] | None = None
    max_length: Tokens | None = None
    top_p: Probability | None = None
    temperature: Temperature | None = None

    model_config = ConfigDict(strict=False, extra="ignore")
