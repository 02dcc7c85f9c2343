"""The model card: ``README.md`` of what `convert` writes and `publish` uploads.

Everything in it comes from ``quantization_report.json``, ``config.json`` and the headers of the weights, so the same
folder gives the same bytes. Licences are repeated as the source states them, never guessed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from . import formats
from ._command import options
from ._sidecars import to_json
from .checkpoint.files import read_json
from .checkpoint.output import CARD, EVALUATION, REPORT, is_sealed, replace_file, sealed
from .checkpoint.source import open_folder
from .errors import SourceError
from .memory import Model, Workload, estimate
from .recipe import Calibration, scheme_name, show_size

_PAGES = {"hf": "https://huggingface.co/", "ms": "https://modelscope.cn/models/"}
_LICENCE_FILES = ("MODEL_LICENSE", "LICENSE", "NOTICE")  # the first is that of the weights
_STATED = ("license", "license_name", "license_link", "language")
_LONGEST = 200
_CONTEXTS = (2048, 8192, 32768)


def stated_facts(folder: Path) -> dict[str, Any]:
    """What the front matter of a checkpoint's own ``README.md`` says of licence and languages, for a report."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        front = yaml.safe_load(match[1]) if match and len(match[1]) < 1 << 16 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(front, dict):
        return {}
    found = {}
    for key in _STATED:
        value = front.get(key)
        texts = value if isinstance(value, list) else [value]
        if all(
            isinstance(t, str) and t.isprintable() and "`" not in t and 0 < len(t) <= _LONGEST for t in texts
        ):
            found[key] = value
    return found


def folder_card(folder: Path, hub: str | None = None, name: str | None = None) -> bytes:
    """The card of a converted folder; `hub` and `name` say where it is to be published.

    Raises:
        SourceError: it was not written by glmquant.
    """
    report = read_json(folder / REPORT)
    try:
        evaluation = read_json(folder / EVALUATION) if (folder / EVALUATION).exists() else None
        model = Model.of_checkpoint(open_folder(folder))
        return sealed("".join(f"{line}\n" for line in _lines(report, model, evaluation, hub, name)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{folder / REPORT} or {EVALUATION} is damaged ({error!r}); convert again."
        ) from None


def record_evaluation(folder: Path, found: Mapping[str, Any]) -> None:
    """Keep what `evaluate` found in a converted folder, and in its card unless somebody has edited that."""
    ours = written_by_us(folder)
    kept = {
        key: value for key, value in found.items() if key not in ("out", "source")
    }  # paths of one machine
    replace_file(folder / EVALUATION, to_json({**kept, "text": Path(found["text"]).name}))
    if ours:
        replace_file(folder / CARD, folder_card(folder))


def written_by_us(folder: Path) -> bool:
    """Whether the card in a folder is as glmquant wrote it, or there is none."""
    path = folder / CARD
    return not path.exists() or is_sealed(path.read_bytes())


def _lines(
    report: Mapping[str, Any],
    model: Model,
    evaluation: Mapping[str, Any] | None,
    hub: str | None,
    name: str | None,
) -> Iterator[str]:
    source, recipe, summary = report["source"], report["recipe"], report["summary"]
    scheme = _scheme(recipe)
    front = _front_matter(report, hub, name)
    base = _base(source, hub)
    called = report["model"][0].upper() + report["model"][1:]
    yield "---"
    yield yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000).rstrip()
    yield from ("---", "")
    yield f"# {name.partition('/')[2] if name else f'{called}, {scheme}'}"
    yield ""
    quantized = _is_quantized(recipe)
    made = f"quantized to {scheme}" if quantized else "in 16 bit, in a layout that needs no remote code"
    if base:
        subject = f"[{base}]({_PAGES[hub or _hub_of(source)]}{base})"
    else:
        told = ""
        if "repository" in source:
            told = f", `{source['repository']}`"
        elif "name" in source:
            told = f" (the config.json of its source names `{source['name']}`)"
        subject = f"{called}{told}"
    yield f"{subject}, {made}, made with [glmquant](#provenance) {report['glmquant']}."
    yield from ("", "| | |", "|---|---|")
    calibrated = f", {Calibration(**recipe['calibration'])}" if recipe.get("calibration") else ""
    ends = f"; embeddings {_end(recipe, 'embeddings')}, output head {_end(recipe, 'head')}"
    if recipe.get("k_quant"):
        types = Counter(entry["scheme"] for entry in report["tensors"].values() if entry["scheme"])
        ends = f" ({', '.join(f'{kind} x {count}' for kind, count in sorted(types.items()))})"
    rows = [
        ("weights", f"{scheme}{ends}"),
        (
            "method",
            f"`{recipe['method']}`{calibrated}" if recipe["method"] else report.get("requantized", "none"),
        ),
        ("format", f"`{recipe['format']}`, {recipe['layout']} layout"),
        ("size", f"{show_size(summary['bytes'])}, {summary['bits_per_weight']} bits per weight"),
        ("source", f"{show_size(summary['source_bytes'])}, stored as `{source['stored_as']}`"),
    ]
    if source["adapter"]:
        rows.append(("adapter", "a LoRA was merged first"))
    if "mean_relative_error" in summary:
        mean, worst = summary["mean_relative_error"], summary["worst_relative_error"]
        rows.append(("relative error", f"{mean:.4f} mean over the quantized weights, {worst:.4f} worst"))
    yield from (f"| {key} | {value} |" for key, value in rows)
    yield from _memory(report, model)
    if evaluation is not None:
        yield from _evaluation(evaluation)
    yield from _loading(report, name or "OUT", hub)
    yield from _licence(report, base)
    yield from _provenance(report)


def _is_quantized(recipe: Mapping[str, Any]) -> bool:
    return recipe["bits"] != 16 or bool(recipe.get("k_quant"))  # with --fit, 16 is for all layers


def _scheme(recipe: Mapping[str, Any]) -> str:
    if recipe.get("fit") and recipe["bits"] != 16:
        kinds = [
            "16 bit" if bits == 16 else f"INT{bits}"
            for bits in sorted({choice["bits"] for choice in recipe["fit"]["choices"]})
        ]
        if len(kinds) == 1:
            return f"{kinds[0]}, groups chosen for every layer"
        return f"{', '.join(kinds[:-1])} and {kinds[-1]}, chosen for every layer"
    if recipe.get("k_quant"):
        return f"{recipe['k_quant'].upper()} by llama.cpp"
    if recipe["bits"] == 16:
        return "16 bit"
    group = recipe["group_size"]
    kind = "" if recipe["symmetric"] else ", asymmetric"
    name = scheme_name(recipe["bits"], group).upper().partition(" ")[0]
    if recipe["format"] == "bitsandbytes" and recipe["bits"] == 4:
        name = "NF4"
        kind = ", scales quantized too" if recipe.get("double_quant") else ""
    if recipe.get("activations"):
        name, kind = "W8A8: INT8 weights", f", activations rounded to {recipe['activations']} bit"
    return name + (f", one scale per row{kind}" if group == "row" else f", groups of {group}{kind}")


def _end(recipe: Mapping[str, Any], end: str) -> str:
    if recipe["format"] == "cpm" and recipe["quantize_embeddings"]:
        return f"{recipe['bits']} bit"
    return "8 bit" if recipe[f"quantize_{end}"] else "16 bit"


def _hub_of(source: Mapping[str, Any]) -> str:
    return str(source.get("repository", "hf")).partition(":")[0]


def _base(source: Mapping[str, Any], hub: str | None) -> str | None:
    """The name of the source on the hub it is to be published on, where it came from a hub and that is known.

    What config.json of a folder calls itself is not enough: after a fine-tune it is often still the name of its base.
    """
    repository = str(source.get("repository", "")).partition(":")[2]
    return repository if repository and hub in (None, _hub_of(source)) else None


def states_base(report: Mapping[str, Any], hub: str) -> bool:
    """Whether the card of what is published on `hub` says which model it was made from."""
    return _base(report["source"], hub) is not None


def _front_matter(report: Mapping[str, Any], hub: str | None, name: str | None) -> dict[str, Any]:
    source, recipe = report["source"], report["recipe"]
    front: dict[str, Any] = {}
    base = _base(source, hub)
    quantized = _is_quantized(recipe)
    if base:
        front["base_model"] = base
        if quantized and not source["adapter"]:  # with an adapter it is a fine-tune, too
            front["base_model_relation"] = "quantized"
    front["library_name"] = "transformers" if "transformers" in _readers(report) else "glmquant"
    front["pipeline_tag"] = "text-generation"
    front["tasks"] = ["text-generation"]  # as ModelScope calls it, and the next
    front["frameworks"] = ["pytorch"]
    front["language"] = source.get("stated", {}).get("language", ["zh", "en"])
    front.update(_licence_fields(report))
    if name:
        front["quantized_by"] = name.partition("/")[0]
    tags = ["glm", "chatglm", "glmquant", recipe["format"]]
    if quantized:
        tags += [
            "quantized",
            *([] if recipe.get("fit") else [_kind_tag(recipe)]),
            *([] if recipe.get("fit") or recipe.get("k_quant") else [f"{recipe['bits']}-bit"]),
        ]
    front["tags"] = list(dict.fromkeys(tags))
    return front


def _kind_tag(recipe: Mapping[str, Any]) -> str:
    if recipe.get("k_quant"):
        return str(recipe["k_quant"])
    if recipe.get("activations"):
        return f"w{recipe['bits']}a{recipe['activations']}"
    return "nf4" if recipe["format"] == "bitsandbytes" and recipe["bits"] == 4 else f"int{recipe['bits']}"


def _licence_fields(report: Mapping[str, Any]) -> dict[str, Any]:
    """As the source states them; where it only has licence files, a pointer to the first of them."""
    stated, files = report["source"].get("stated", {}), _licence_files(report)
    fields = {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}
    licence, link = fields.get("license"), str(fields.get("license_link", ""))
    if link and not link.startswith(("https://", "http://")) and link not in files:
        del fields["license_link"]  # a file that did not come along
    if licence is None and not files:
        return {}
    # Hubs refuse a card whose licence is no identifier; the text says how it was stated.
    if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        fields["license"] = "other"
    if fields["license"] == "other" and "license_link" not in fields and files:
        fields["license_link"] = files[0]
    return {key: fields[key] for key in ("license", "license_name", "license_link") if key in fields}


def stated_licence(report: Mapping[str, Any]) -> str | None:
    """The licence as a hub's identifier."""
    return _licence_fields(report).get("license")


def _licence_files(report: Mapping[str, Any]) -> list[str]:
    return [name for kind in _LICENCE_FILES for name in sorted(report["files"]) if name.startswith(kind)]


def _readers(report: Mapping[str, Any]) -> list[str]:
    """What reads the folder as it is, without a conversion of its own."""
    recipe = report["recipe"]
    runtimes = formats.get(recipe["format"]).abilities.runtimes
    if report["family"] == "chatglm":
        return ["glmquant"]
    absent = set() if any(name.endswith(".gguf") for name in report["files"]) else {"llama.cpp"}
    if recipe["layout"] == "original":
        absent.add("transformers")
    if recipe["format"] == "compressed-tensors" and recipe["quantize_embeddings"]:
        absent.add("vllm")
        if recipe["bits"] != 8 or not recipe["quantize_head"]:
            absent.add("transformers")
    return [runtime for runtime in runtimes if runtime not in absent]


def _memory(report: Mapping[str, Any], model: Model) -> Iterator[str]:
    readers = _readers(report)
    limit = model.dims.context
    contexts = sorted({n for n in (*_CONTEXTS, limit) if n <= limit})
    yield from ("", "## GPU memory", "")
    yield "Peak of one sequence with a 16-bit cache, as `glmquant check` predicts it from the sizes in the files:"
    yield ""
    yield f"| tokens | {' | '.join(readers)} |"
    yield f"|---|{'---|' * len(readers)}"
    notes = {}
    for context in contexts:
        cells = []
        for runtime in readers:
            found = estimate(model, Workload(context), runtime)
            cells.append(show_size(found.peak))
            notes[runtime] = [found.note, "figures for it are approximate" if found.approximate else ""]
        yield f"| {context} | {' | '.join(cells)} |"
    for runtime, texts in notes.items():
        told = "; ".join(text for text in texts if text)
        if told:
            yield from ("", f"{runtime}: {told}.")


def _evaluation(found: Mapping[str, Any]) -> Iterator[str]:
    def shown(key: str, scale: float = 1) -> str:
        value, error = found[key]["value"], found[key]["error"]
        return f"{scale * value:.4g}" + ("" if error is None else f" ± {scale * error:.1g}")

    yield from ("", "## Evaluation", "")
    yield (
        f"Against its source, with `glmquant eval`: {Path(found['text']).name}, {found['predictions']} predicted "
        f"tokens in windows of {found['window']}, both models computed in {found['dtype']}."
    )
    yield from ("", "| | this model | source |", "|---|---|---|")
    yield f"| perplexity | {shown('perplexity')} | {shown('source_perplexity')} |"
    yield f"| KL divergence, nats per token | {shown('kl_mean')} | |"
    yield f"| same likeliest token | {shown('top1_agreement', 100)} % | |"


def _loading(report: Mapping[str, Any], name: str, hub: str | None) -> Iterator[str]:
    readers, native = _readers(report), report["recipe"]["layout"] == "native"
    yield from ("", "## How to load", "")
    if hub == "ms":
        yield f"`modelscope download --model {name} --local_dir OUT` downloads it; use `OUT` for its name below."
        yield ""
        name = "OUT"
    if "transformers" in readers:
        stored = report["recipe"]["format"]  # a quantized one has the name of the package that reads it
        needed = ["transformers", *([] if stored == "safetensors" else [stored]), "accelerate"]
        yield f"transformers (`pip install {' '.join(needed)}`), without remote code:"
        yield from _code("python", f"""
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained("{name}")
            model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")
            messages = [{{"role": "user", "content": "你好"}}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0][inputs["input_ids"].shape[1]:]))
        """)  # fmt: skip
    if "vllm" in readers and native:
        yield "vLLM:"
        yield from _code("", f"vllm serve {name}")
    elif "vllm" in readers:
        yield from (
            "vLLM reads these weights as its `ChatGLMModel`; it needs the tokenizer of the base model.",
            "",
        )
    for file in report["files"]:
        if file.endswith(".gguf"):
            yield "llama.cpp:"
            yield from _code("", f"llama-cli -m {file} -cnv")
    if "llama.cpp" not in readers:
        yield from ("llama.cpp reads GGUF files only, which these are not.", "")
    ref = name if hub != "ms" else "OUT"
    packed = (
        "unpacks these to 16 bit"
        if report["recipe"].get("k_quant")
        else "keeps quantized weights packed in memory"
    )
    yield f"glmquant, which {packed}:"
    yield from _code("", f"glmquant chat {ref}")
    yield from _code("python", f"""
        import glmquant

        model, tokenizer = glmquant.load("{ref}"), glmquant.load_tokenizer("{ref}")
        response, history = model.chat(tokenizer, "你好", history=[])
    """)  # fmt: skip


def _code(language: str, text: str) -> Iterator[str]:
    lines = text.strip("\n").rstrip().split("\n")
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    yield from (f"```{language}", *(line[indent:] for line in lines), "```", "")


def _licence(report: Mapping[str, Any], base: str | None) -> Iterator[str]:
    stated, files = report["source"].get("stated", {}), _licence_files(report)
    yield from ("## Licence", "")
    of = f"that of {base}" if base else "that of the model it was made from"
    told = [f"`{stated[key]}`" for key in ("license", "license_name", "license_link") if key in stated]
    as_stated = f", which states {', '.join(told)}" if told else ""
    come = f" Its files came along: {', '.join(f'[{name}]({name})' for name in files)}." if files else ""
    yield f"The licence is {of}{as_stated}.{come}"
    if not told and not files:
        yield "The checkpoint itself came with no word on it: look it up where the model was published."
    yield ""


def _provenance(report: Mapping[str, Any]) -> Iterator[str]:
    source = report["source"]
    yield from ("## Provenance", "")
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    yield f"Written by glmquant {report['glmquant']} ({versions}):"
    where = "SOURCE"
    if "repository" in source:
        where = source["repository"] + (f"@{source['commit']}" if "commit" in source else "")
    yield from _code("", f"glmquant convert {where} OUT {options(report)}")
    if "repository" not in source:
        yield from ("`SOURCE`: the folder whose files have the hashes below.", "")
    yield f"`{REPORT}` has the error of every weight and the hash of every file; `glmquant verify` checks them."
    yield from ("", "| weights | SHA-256 |", "|---|---|")
    for title, files in (("read", source["files"]), ("written", report["files"])):
        for file, entry in files.items():
            if file.endswith((".safetensors", ".bin", ".gguf")):
                yield f"| {title}: `{file}` | `{entry['sha256']}` |"
