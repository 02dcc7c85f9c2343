"""glmquant: quantize ChatGLM and GLM checkpoints into ones that load everywhere.

::

    import glmquant

    glmquant.convert("chatglm3-6b", "chatglm3-6b-int4")      # INT4, groups of 128, compressed-tensors
    print(glmquant.inspect("chatglm3-6b-int4").nbytes)
    assert glmquant.verify("chatglm3-6b-int4", source="chatglm3-6b").ok

Importing this package is cheap: torch is loaded when a function that needs it is first looked up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from ._check import Check, check
    from ._convert import ConvertResult, convert, plan_conversion
    from ._evaluate import Estimate, Evaluation, evaluate
    from ._inspect import Inspection, inspect
    from ._publish import Publication, publish
    from ._recipes import RecipeRow, recipes
    from ._sensitivity import Measurement, measure
    from ._verify import Verification, verify
    from .errors import (
        DoesNotFitError,
        GlmquantError,
        HubError,
        ModelError,
        OutOfMemoryError,
        OutputError,
        QuantizationError,
        QuantizedSourceError,
        SourceError,
        UnsafeFileError,
        UsageError,
        VerificationError,
    )
    from .hub import Download, download
    from .models.chat import chat, stream_chat
    from .models.loading import load
    from .plan import Plan
    from .recipe import Fit, Recipe
    from .scheme import QuantizedTensor, Scheme
    from .tokenizers.loading import load_tokenizer

_HOMES = {
    "ConvertResult": "_convert", "convert": "_convert", "plan_conversion": "_convert",
    "Estimate": "_evaluate", "Evaluation": "_evaluate", "evaluate": "_evaluate",
    "Inspection": "_inspect", "inspect": "_inspect",
    "Verification": "_verify", "verify": "_verify",
    "GlmquantError": "errors", "HubError": "errors", "ModelError": "errors",
    "OutOfMemoryError": "errors", "OutputError": "errors", "QuantizationError": "errors",
    "QuantizedSourceError": "errors", "SourceError": "errors", "UnsafeFileError": "errors",
    "UsageError": "errors", "VerificationError": "errors",
    "Check": "_check", "check": "_check", "RecipeRow": "_recipes", "recipes": "_recipes",
    "Measurement": "_sensitivity", "measure": "_sensitivity", "DoesNotFitError": "errors", "Fit": "recipe",
    "Publication": "_publish", "publish": "_publish",
    "Plan": "plan", "Recipe": "recipe", "QuantizedTensor": "scheme", "Scheme": "scheme",
    "Download": "hub", "download": "hub",
    "load": "models.loading", "load_tokenizer": "tokenizers.loading",
    "chat": "models.chat", "stream_chat": "models.chat",
}  # fmt: skip

__all__ = [
    "Check", "ConvertResult", "DoesNotFitError", "Download", "Estimate", "Evaluation", "Fit", "GlmquantError",
    "HubError", "Inspection", "Measurement", "ModelError", "OutOfMemoryError", "OutputError", "Plan",
    "Publication", "QuantizationError", "QuantizedSourceError", "QuantizedTensor", "Recipe", "RecipeRow",
    "Scheme", "SourceError", "UnsafeFileError", "UsageError", "Verification", "VerificationError",
    "__version__", "chat", "check", "convert", "download", "evaluate", "inspect", "load", "load_tokenizer",
    "measure", "plan_conversion", "publish", "recipes", "stream_chat", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
