"""The main job on a real language model, start to end; ``make demo`` runs this.

Builds a ChatGLM3 checkpoint that holds SmolLM2-135M-Instruct (see benchmarks/standin.py), converts it to INT8 and
INT4 with the command line, verifies both, and lets stock transformers answer the same questions from the 16-bit, the
INT8 and the INT4 weights.

    python -m benchmarks.demo [FOLDER]
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from . import measure, standin

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue? Answer in one sentence.",
)
_NEW_TOKENS = 32
_VARIANTS = (("16 bit", ("--bits", "16")), ("INT8", ("--bits", "8")), ("INT4", ()))


def main() -> None:
    """See the module."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    source = folder / "chatglm3-standin"
    print(
        f"Building {source}: SmolLM2-135M-Instruct as a ChatGLM3 checkpoint (float16, 2 shards) ...",
        flush=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    standin.build(source, standin.Recipe(variant="wide", shards=2))
    outs = {}
    rows = []
    for name, options in _VARIANTS:
        out = folder / f"chatglm3-standin-{name.lower().replace(' ', '')}"
        shutil.rmtree(out, ignore_errors=True)
        print(f"$ glmquant convert {source} {out} {' '.join(options)}".rstrip(), flush=True)
        cost = measure.run(_glmquant("convert", str(source), str(out), *options, "--json"), sync=True)
        print(f"$ glmquant verify {out} --source {source}", flush=True)
        checked = json.loads(
            measure.run(_glmquant("verify", str(out), "--source", str(source), "--json")).output
        )
        outs[name] = out
        rows.append(_row(name, cost, json.loads(cost.output)["summary"], checked))
    print(
        "\n"
        + _table(
            (
                "weights",
                "GiB",
                "smaller",
                "bits/weight",
                "seconds",
                "peak MiB",
                "mean error",
                "worst",
                "verify",
            ),
            rows,
        )
    )
    print("\nThe same questions, greedy, in stock transformers (no glmquant, no remote code):")
    answers = {name: _answers(out) for name, out in outs.items()}
    for number, question in enumerate(QUESTIONS):
        print(f"\n  {question}")
        for name in answers:
            print(f"    {name:<7}{answers[name][number]}")
    print(f"\nThe checkpoints are in {folder.resolve()}.")


def _glmquant(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "glmquant.cli", *arguments]


def _row(
    name: str, cost: measure.Measured, summary: dict[str, Any], checked: dict[str, Any]
) -> tuple[str, ...]:
    mean, worst = summary.get("mean_relative_error"), summary.get("worst_relative_error")
    return (
        name,
        f"{summary['bytes'] / 2**30:.2f}",
        f"{summary['source_bytes'] / summary['bytes']:.2f} x",
        f"{summary['bits_per_weight']:.2f}",
        f"{cost.seconds:.1f}",
        f"{cost.peak_anonymous_bytes / 2**20:.0f}",
        f"{mean:.4f}" if mean is not None else "0",
        f"{worst:.4f}" if worst is not None else "0",
        "sound" if checked["ok"] else "not sound",  # and the command has failed already
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _answers(folder: Path) -> list[str]:
    """Greedy answers of the model in `folder`, loaded as any user of transformers would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    answers = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            ids = model.generate(
                **inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=_NEW_TOKENS
            )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(text.split()))
    return answers


if __name__ == "__main__":
    main()
