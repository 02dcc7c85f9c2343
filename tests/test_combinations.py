"""The table of what goes together: all of it plans, nothing else does, and every refusal gives advice that works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers_formats import GOLDEN, write_chatglm2

from glmquant.checkpoint.source import TensorSource, open_folder
from glmquant.errors import UsageError
from glmquant.families import Role
from glmquant.plan import Plan, make_plan
from glmquant.recipe import Recipe
from glmquant.scheme import Scheme

MODELS = ("ChatGLM-6B", "ChatGLM2-6B", "GLM-4-9B-hf")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TensorSource]:
    """One model of each layout situation: original only, both, native only."""
    folder = tmp_path_factory.mktemp("models")
    write_chatglm2(folder / "v2", num_layers=1)
    import glmquant

    glmquant.convert(folder / "v2", folder / "hf", Recipe(bits=16))
    return {
        "ChatGLM-6B": open_folder(GOLDEN / "chatglm-6b/tiny-3l/bin-fp16"),
        "ChatGLM2-6B": open_folder(folder / "v2"),
        "GLM-4-9B-hf": open_folder(folder / "hf"),
    }


def is_allowed(model: str, r: Recipe) -> bool:
    """The table of the design, as far as these formats go; written down once more, on purpose."""
    first, native_only = model == "ChatGLM-6B", model == "GLM-4-9B-hf"
    if r.bits == 16:
        unquantized = (r.group_size, r.method, r.symmetric) == (None, None, True)
        layouts = (
            [None, "original"] if first else [None, "native"] if native_only else [None, "native", "original"]
        )
        ends = r.quantize_head or r.quantize_embeddings
        if r.format == "gguf":
            own = None if native_only or first else "original"
            return unquantized and not ends and not first and r.layout in (None, own or "native")
        return r.format in (None, "safetensors") and unquantized and r.layout in layouts and not ends
    fmt = r.format or ("cpm" if first else "compressed-tensors")
    if fmt == "compressed-tensors":
        return (
            not first
            and r.group_size in (None, 32, 64, 128, "row")
            and (r.symmetric or r.bits == 4)
            and (r.method in (None, "mse", "rtn", "gptq") or (r.method == "hqq" and not r.symmetric))
            and (r.layout in (None, "native") or not native_only)
        )
    if fmt in ("gptq", "bitsandbytes", "gguf") and first:
        return False
    ends = r.quantize_head or r.quantize_embeddings
    ours = r.method in (None, "mse", "rtn")
    if fmt == "gptq":
        ours = ours or r.method == "gptq"
        layout = r.layout in (None, "native") or not native_only
        return r.group_size in (None, 32, 64, 128, "row") and r.symmetric and ours and layout and not ends
    if fmt == "bitsandbytes":
        group = r.group_size in (None, 64 if r.bits == 4 else "row")
        return group and r.symmetric and r.method is None and r.layout in (None, "native") and not ends
    if fmt == "gguf":
        own = "native" if native_only else "original"
        return (
            r.group_size in (None, 32) and (r.symmetric or r.bits == 4) and ours and r.layout in (None, own)
        )
    if fmt == "cpm":
        return (
            not native_only
            and r.group_size in (None, "row")
            and r.symmetric
            and r.method != "hqq"
            and r.layout in (None, "original")
            and (first or not r.quantize_embeddings)
            and (r.quantize_embeddings or not r.quantize_head)
        )
    return False


def every_recipe() -> Iterator[Recipe]:
    for bits, group, symmetric, method, fmt, layout, head, embeddings in product(
        (4, 8, 16),
        (None, 32, "row", 48),
        (True, False),
        (None, "rtn", "mse", "hqq", "gptq", "thudm"),
        (None, "compressed-tensors", "cpm", "gptq", "bitsandbytes", "gguf", "safetensors"),
        (None, "native", "original"),
        (False, True),
        (False, True),
    ):
        yield Recipe(bits, group, symmetric, method, fmt, layout, head, embeddings)  # type: ignore[arg-type]


def check_choices(model: str, asked: Recipe, plan: Plan) -> None:
    """What was asked for is what is planned; what was left open got the documented default."""
    done = plan.recipe
    for field in ("bits", "symmetric", "quantize_head", "quantize_embeddings", "max_shard_size"):
        assert getattr(done, field) == getattr(asked, field)
    for field in ("group_size", "method", "format", "layout"):
        assert getattr(asked, field) in (None, getattr(done, field))
    if asked.bits == 16:
        assert (done.format, done.method) == (asked.format or "safetensors", None)
        assert not any(item.scheme for item in plan.items)
        return
    if asked.format is None:
        assert done.format == ("cpm" if model == "ChatGLM-6B" else "compressed-tensors")
    cpm = done.format == "cpm"
    if asked.method is None:
        own = {"cpm": "thudm", "bitsandbytes": "bitsandbytes"}
        assert done.method == own.get(str(done.format), "mse")
    if asked.group_size is None:
        groups = {"cpm": "row", "gguf": 32, "bitsandbytes": 64 if asked.bits == 4 else "row"}
        assert done.group_size == groups.get(str(done.format), 128)
    if asked.layout is None:
        named_as_thudm = cpm or (done.format == "gguf" and model == "ChatGLM2-6B")
        assert done.layout == ("original" if named_as_thudm else "native")
    group = None if done.group_size == "row" else int(str(done.group_size))
    linear = Scheme(asked.bits, group, asked.symmetric, "float16")
    if done.format == "gguf" and not asked.symmetric:
        linear = replace(linear, minimum=True)
    elif done.format == "bitsandbytes":
        linear = replace(linear, scale_dtype="float32", book="nf4" if asked.bits == 4 else "llm.int8")
    ends = linear if cpm else Scheme(8, group, True, "float16")
    for item in plan.items:
        expected = {
            Role.LINEAR: linear,
            Role.HEAD: ends if asked.quantize_head or (cpm and asked.quantize_embeddings) else None,
            Role.EMBEDDING: ends if asked.quantize_embeddings else None,
        }.get(item.role)
        assert item.scheme == expected, item.name


@pytest.mark.parametrize("model", MODELS)
def test_the_table_plans_and_nothing_else_does(sources: dict[str, TensorSource], model: str) -> None:
    planned = 0
    for recipe in every_recipe():
        try:
            plan = make_plan(sources[model], recipe)
        except UsageError:
            assert not is_allowed(model, recipe), recipe
        else:
            assert is_allowed(model, recipe), recipe
            check_choices(model, recipe, plan)
            planned += 1
    assert planned > 20


def advised(recipe: Recipe, message: str) -> list[Recipe]:
    """The recipes that a refusal proposes, by what it literally says."""
    flags: dict[str, dict[str, Any]] = {
        "--quantize-head": {"quantize_head": False},
        "--quantize-embeddings": {"quantize_embeddings": False},
        "--asymmetric": {"symmetric": True},
        "--group-size": {"group_size": None},
        "--method": {"method": None},
        "--layout": {"layout": None},
    }
    found = []
    if left_out := re.search(r"leave out ([^;.]*?)(?:, or use|[;.])", message):
        changes: dict[str, Any] = {}
        for flag in re.findall(r"--[a-z-]+", left_out[1]):
            changes |= flags[flag]
        found.append(replace(recipe, **changes))
    if "use --symmetric" in message:
        found.append(replace(recipe, symmetric=True))
    if "use --quantize-embeddings" in message:
        found.append(replace(recipe, quantize_embeddings=True))
    pattern = (
        r"(?:use|goes with) --(format|layout|method|group-size) ([\w-]+(?:, (?!not )[\w-]+)*(?: or [\w-]+)?)"
    )
    for field, text in re.findall(pattern, message):
        for value in re.split(r", | or ", text):
            number = int(value) if value.isdigit() else value
            found.append(replace(recipe, **{field.replace("-", "_"): number}))
    return found


def why_not(source: TensorSource, recipe: Recipe) -> str | None:
    try:
        make_plan(source, recipe)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("model", MODELS)
def test_following_advice_always_ends_in_a_plan(sources: dict[str, TensorSource], model: str) -> None:
    source = sources[model]
    known: dict[Recipe, str | None] = {}

    def reason(recipe: Recipe) -> str | None:
        if recipe not in known:
            known[recipe] = why_not(source, recipe)
        return known[recipe]

    for recipe in every_recipe():
        seen = []
        while (message := reason(recipe)) is not None:
            assert message not in seen, f"advice goes in a circle: {seen}"
            seen.append(message)
            choices = advised(recipe, message)
            assert choices, f"no advice in: {message}"
            for other in choices[1:]:
                assert reason(other) != message, f"advice that changes nothing: {message}"
            recipe = choices[0]


ONE_WRONG = [
    ("ChatGLM2-6B", {"group_size": 48}),
    ("ChatGLM2-6B", {"bits": 8, "symmetric": False}),
    ("ChatGLM2-6B", {"method": "thudm"}),
    ("ChatGLM2-6B", {"format": "safetensors"}),
    ("ChatGLM2-6B", {"bits": 16, "format": "compressed-tensors"}),
    ("ChatGLM2-6B", {"bits": 16, "format": "cpm"}),
    ("ChatGLM2-6B", {"bits": 16, "group_size": 32}),
    ("ChatGLM2-6B", {"bits": 16, "symmetric": False}),
    ("ChatGLM2-6B", {"bits": 16, "method": "rtn"}),
    ("ChatGLM2-6B", {"bits": 16, "quantize_head": True}),
    ("ChatGLM2-6B", {"format": "cpm", "group_size": 32}),
    ("ChatGLM2-6B", {"format": "cpm", "symmetric": False}),
    ("ChatGLM2-6B", {"format": "cpm", "layout": "native"}),
    ("ChatGLM2-6B", {"format": "cpm", "quantize_head": True}),
    ("ChatGLM2-6B", {"format": "cpm", "quantize_embeddings": True}),
    ("ChatGLM-6B", {"format": "compressed-tensors"}),
    ("ChatGLM-6B", {"group_size": 128}),
    ("ChatGLM-6B", {"symmetric": False}),
    ("ChatGLM-6B", {"layout": "native"}),
    ("ChatGLM-6B", {"bits": 16, "layout": "native"}),
    ("ChatGLM-6B", {"quantize_head": True}),
    ("ChatGLM-6B", {"format": "safetensors"}),
    ("GLM-4-9B-hf", {"format": "cpm"}),
    ("GLM-4-9B-hf", {"layout": "original"}),
    ("GLM-4-9B-hf", {"bits": 16, "layout": "original"}),
]


def _id(model: str, choices: dict[str, Any]) -> str:
    return "-".join([model, *(f"{key}={value}" for key, value in choices.items())])


@pytest.mark.parametrize(
    ("model", "choices"),
    [*(pytest.param(m, c, id=_id(m, c)) for m, c in ONE_WRONG)],
)
def test_one_wrong_choice_is_put_right_by_any_of_the_advice(
    sources: dict[str, TensorSource], model: str, choices: dict[str, Any]
) -> None:
    recipe = Recipe(**choices)
    message = why_not(sources[model], recipe)
    assert message is not None
    assert message.count(". ") == 0, "one sentence"
    alternatives = advised(recipe, message)
    assert alternatives, message
    for alternative in alternatives:
        assert why_not(sources[model], alternative) is None, (message, alternative)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"format": "awq"},
            "format 'awq' is not known; use compressed-tensors, cpm, gptq, bitsandbytes, gguf, safetensors",
        ),
        ({"method": "best"}, "method 'best' is not known; use rtn, mse, thudm, bitsandbytes"),
        (
            {"method": "thudm"},
            "--method thudm does not go with --format compressed-tensors; use --method mse",
        ),
        (
            {"bits": 8, "symmetric": False},
            "compressed-tensors can be asymmetric only with --bits 4; use --symmetric",
        ),
        ({"format": "cpm", "symmetric": False}, "--format cpm cannot be asymmetric; use --symmetric"),
        ({"format": "cpm", "group_size": 64}, "--format cpm has no group size 64; use --group-size row"),
    ],
    ids=["format", "method", "thudm", "asymmetric", "cpm-asymmetric", "cpm-groups"],
)
def test_refusals_say(sources: dict[str, TensorSource], choices: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        make_plan(sources["ChatGLM2-6B"], Recipe(**choices))


def test_a_width_that_groups_do_not_divide_is_named(tmp_path: Path) -> None:
    write_chatglm2(tmp_path, ffn_hidden_size=192, num_layers=1)
    source = open_folder(tmp_path)
    message = why_not(source, Recipe())
    assert message is not None
    assert "the 192 columns of model.layers.0.mlp.down_proj.weight" in message
    assert "group sizes that do: 32, 64, row." in message
    for choice in (32, 64, "row"):
        assert why_not(source, Recipe(group_size=choice)) is None  # type: ignore[arg-type]


def test_cpm_needs_even_columns_for_4_bits_only(tmp_path: Path) -> None:
    write_chatglm2(tmp_path, ffn_hidden_size=129, num_layers=1)
    source = open_folder(tmp_path)
    message = why_not(source, Recipe(format="cpm"))
    assert message is not None
    assert "dense_4h_to_h.weight has 129 columns" in message
    assert why_not(source, Recipe(format="cpm", bits=8)) is None
