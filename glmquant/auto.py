"""``import glmquant.auto``: THUDM's model-card code works on today's transformers, without the code in the folder.

::

    import glmquant.auto
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("chatglm3-6b", trust_remote_code=True)
    model = AutoModel.from_pretrained("chatglm3-6b", trust_remote_code=True).half().cuda()
    response, history = model.chat(tokenizer, "你好", history=[])

Folders with ``model_type: chatglm`` are then loaded by `glmquant.load` and `glmquant.load_tokenizer`, 16-bit ones and
INT4 / INT8 ones, by AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM and AutoTokenizer, also as modelscope
exports them. So are the native folders (``model_type: glm`` and ``glm4``) that glmquant wrote, by AutoModel and
AutoModelForCausalLM. ``trust_remote_code=True`` is accepted and changes nothing. Everything else transformers loads as
ever. ``AutoModel.from_config`` gives a model with random weights.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Glm4ForCausalLM,
    Glm4Model,
    GlmForCausalLM,
    GlmModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import tokenization_auto
from transformers.utils import cached_file

from . import families, formats, hub
from .checkpoint.output import REPORT
from .errors import SourceError, UnsafeFileError, UsageError
from .models import chatglm_config
from .models.building import bad_field, class_and_config
from .models.loading import checked_dtype, load
from .tokenizers.common import optional_json
from .tokenizers.original_chatglm import ChatGLMTokenizer
from .tokenizers.original_chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from .tokenizers.original_glm4 import ChatGLM4Tokenizer

__all__ = ["ChatGLMAutoModel"]

# Options of from_pretrained that say where a hub is and how files are read. A folder on this machine needs none.
_WITHOUT_EFFECT = frozenset({
    "_from_auto", "cache_dir", "code_revision", "empty_init", "force_download", "local_files_only",
    "low_cpu_mem_usage", "offload_state_dict", "proxies", "resume_download", "revision", "token", "trust_remote_code",
    "use_auth_token", "use_safetensors", "weights_only",
})  # fmt: skip
_LOAD_OPTIONS = ("attn_implementation", "device_map", "max_memory", "offload_folder")
# What transformers itself puts into a configuration that it has read.
_RUNTIME_FIELDS = frozenset({
    "attn_implementation", "dtype", "tokenizer_class", "torch_dtype", "transformers_version",
})  # fmt: skip

# By which Auto classes that nobody registers here, and pipelines, would find code of the folder.
_CODE_FIELDS = frozenset({"auto_map", "custom_pipelines"})


class ChatGLMConfig(chatglm_config.ChatGLMConfig):
    """The configuration by which the Auto classes know ``chatglm`` folders; all of them read it first."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that ``config.json`` holds; AutoConfig says which folder it is from.

        Raises:
            UnsafeFileError: AutoTokenizer would run code from the folder when told to trust it. It does so for classes
                that nobody has registered; those that THUDM published are.
            SourceError: a value is none that a configuration can have.
            UsageError: neither is a dtype that was asked for.
        """
        config_dict = {name: value for name, value in config_dict.items() if name not in _CODE_FIELDS}
        folder = Path(kwargs.get("name_or_path", "."))
        if "name_or_path" in kwargs:
            # AutoModel wants back the options that are no fields; it never looks at the tokenizer.
            _check_tokenizer_class(folder, for_model=kwargs.get("return_unused_kwargs", False))
            if not (folder / "tokenizer.json").exists():
                # What AutoTokenizer takes where tokenizer_config.json, or the class in it, is missing.
                config_dict["tokenizer_class"] = ChatGLMTokenizer.__name__
        if not isinstance(config_dict.get("quantization_config", {}), dict):
            formats.detect(config_dict)  # refuses all but nothing in another spelling
            del config_dict["quantization_config"]
        families.stated_dtype(config_dict)
        for dtype in (kwargs.get("dtype"), kwargs.get("torch_dtype")):
            if isinstance(dtype, str) and dtype != "auto":
                checked_dtype(dtype)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise bad_field(error, config_dict, folder) from error


def _check_tokenizer_class(folder: Path, for_model: bool) -> None:
    path = folder / "tokenizer_config.json"
    tokenizer = optional_json(path)
    name = tokenizer.get("tokenizer_class")
    if name in _TOKENIZERS:
        return
    if "auto_map" in tokenizer:
        raise UnsafeFileError(
            f"{path} asks for code of its own, for a tokenizer of class {name!r} ({', '.join(_TOKENIZERS)} are known); "
            "take auto_map out of the file, or use glmquant.load and glmquant.load_tokenizer, which run no code."
        )
    # transformers would make something of the vocabulary that gives other ids.
    if name is not None and not for_model and not (folder / "tokenizer.json").exists():
        raise SourceError(
            f"{path} names a tokenizer of class {name!r}, which is none of ChatGLM's ({', '.join(_TOKENIZERS)}); take "
            "the file that was published with the model."
        )


class ChatGLMAutoModel:
    """What the Auto classes call for a ``chatglm`` configuration; see `glmquant.load` for what comes back."""

    config_class: ClassVar[type[PreTrainedConfig]] = ChatGLMConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *args: Any,
        config: PreTrainedConfig | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device: Any = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Load a folder; the model is on the CPU unless `device` or `device_map` says otherwise.

        Raises:
            UsageError: an option that would be without its effect, such as another library's quantization.
        """
        revision = options.get("revision")
        at = f"@{revision}" if revision and hub.resolve(pretrained_model_name_or_path).folder is None else ""
        folder = hub.local_folder(
            f"{pretrained_model_name_or_path}{at}" if at else pretrained_model_name_or_path
        )
        if config is not None:
            _refuse_changes(config, folder)
        given = {name: options.pop(name) for name in _LOAD_OPTIONS if name in options}
        unknown = sorted(
            name
            for name, value in options.items()
            if name not in _WITHOUT_EFFECT and value not in (None, "", False)
        )
        if args or unknown:
            named = ", ".join(unknown) or "positional arguments"
            advice = (
                "quantize with model.quantize(4), or once and for all with glmquant.convert"
                if any(name.startswith("load_in_") or name == "quantization_config" for name in unknown)
                else "leave them out"
            )
            raise UsageError(f"{named} cannot be used with ChatGLM models here; {advice}.")
        if given.get("device_map") is None:
            given["device"] = "cpu" if device is None else device
        elif device is not None:
            raise UsageError("device and device_map contradict each other; pass one of them.")
        return load(
            folder,
            dtype=torch_dtype if dtype is None else dtype,
            # where AutoModel was given the folder of an adapter, it has looked up the base
            adapter=(adapter_kwargs or {}).get("_adapter_model_path"),
            **given,
        )

    @classmethod
    def _from_config(cls, config: ChatGLMConfig, **options: Any) -> Any:
        """What ``from_config`` calls: the model with random weights."""
        values = config.to_dict()
        family = families.detect(values)
        family.dims(values)
        if formats.detect(values).name != "safetensors":
            raise UsageError(
                "a configuration of quantized weights gives no model without them; use from_pretrained."
            )
        model_class, own = class_and_config(family, values)
        return model_class._from_config(own, **options)


def _native(stock: type[PreTrainedModel]) -> type[ChatGLMAutoModel]:
    """What the Auto classes call where they would call `stock`: folders that glmquant did not write are left to it."""

    class NativeAutoModel(ChatGLMAutoModel):
        config_class = stock.config_class

        @classmethod
        def from_pretrained(
            cls, pretrained_model_name_or_path: str | PathLike[str], *args: Any, **options: Any
        ) -> Any:
            """A model of `glmquant.load`, with ``chat`` and ``quantize``, or one of transformers' own."""
            name = pretrained_model_name_or_path
            place = {option: options[option] for option in _PLACE_OPTIONS if option in options}
            report = cached_file(name, REPORT, _raise_exceptions_for_missing_entries=False, **place)
            if report is None or options.get("subfolder"):
                return stock.from_pretrained(name, *args, **options)
            return super().from_pretrained(name, *args, **options)

        @classmethod
        def _from_config(cls, config: Any, **options: Any) -> Any:
            return stock._from_config(config, **options)

    NativeAutoModel.__name__ = stock.__name__  # pipelines know what they can run by its name
    return NativeAutoModel


def _refuse_changes(config: PreTrainedConfig, folder: Path) -> None:
    """The model is built from config.json: changes to the object would silently be without effect."""
    stored = type(config).from_pretrained(folder).to_dict()
    given = config.to_dict()
    changed = sorted(
        name
        for name in {*stored, *given}
        if given.get(name) != stored.get(name) and not name.startswith("_") and name not in _RUNTIME_FIELDS
    )
    if "pre_seq_len" in changed:
        raise UsageError(
            "P-tuning prefixes (pre_seq_len) are not supported; use a LoRA, or a merged fine-tune."
        )
    if changed:
        raise UsageError(
            f"the configuration was changed in {', '.join(changed)}, and models are built from config.json; change "
            "the file in the folder instead."
        )


# ChatGLM2-6B's and 3-6B's were published as ChatGLMTokenizer too; that class finds out which it is.
_TOKENIZERS = {
    tokenizer.__name__: tokenizer
    for tokenizer in (ChatGLMTokenizer, ChatGLM2Tokenizer, ChatGLM3Tokenizer, ChatGLM4Tokenizer)
}


def _key(tokenizer: type) -> type:
    """A configuration class to register a tokenizer under.

    transformers prefers the code in a folder to a tokenizer that is registered for the folder's own configuration
    class, and it prefers a registered tokenizer *of the name in tokenizer_config.json* to that code.
    """
    return type(
        f"_{tokenizer.__name__}Config", (PreTrainedConfig,), {"model_type": f"glmquant-{tokenizer.__name__}"}
    )


_KEYS = {name: _key(tokenizer) for name, tokenizer in _TOKENIZERS.items()}

# Where AutoTokenizer runs code of a repository. What a configuration is made from says neither which revision of a
# repository is meant nor how to get it; this call does.
_run_code = tokenization_auto.get_class_from_dynamic_module
_PLACE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


def _run_code_of_others(class_reference: str, name: str | PathLike[str], *args: Any, **options: Any) -> Any:
    """What AutoTokenizer calls instead: refuses ``chatglm`` models, whose tokenizers are registered or unknown."""
    place = {option: options[option] for option in _PLACE_OPTIONS if option in options}
    path = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False, **place)
    if path is not None and optional_json(Path(path)).get("model_type") == "chatglm":
        raise UnsafeFileError(
            f"tokenizer_config.json of {name} asks for code of its own, {class_reference!r} ({', '.join(_TOKENIZERS)} "
            "are known here); use glmquant.load and glmquant.load_tokenizer, which run no code."
        )
    return _run_code(class_reference, name, *args, **options)


def register() -> None:
    """Register the classes; done on import, and harmless to repeat."""
    AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        auto.register(ChatGLMConfig, ChatGLMAutoModel, exist_ok=True)
    for auto, models in (
        (AutoModel, (GlmModel, Glm4Model)),
        (AutoModelForCausalLM, (GlmForCausalLM, Glm4ForCausalLM)),
    ):
        for stock in models:
            auto.register(stock.config_class, _native(stock), exist_ok=True)
    for name, tokenizer in _TOKENIZERS.items():
        AutoTokenizer.register(_KEYS[name], slow_tokenizer_class=tokenizer, exist_ok=True)
    tokenization_auto.get_class_from_dynamic_module = _run_code_of_others


register()
