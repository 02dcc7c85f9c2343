"""Plans for the real models, made from their headers alone, against arithmetic done here."""

from __future__ import annotations

import json
import math

import pytest
from helpers_sources import HEADERS, Header, HeaderSource, nbytes

from glmquant import families
from glmquant.errors import UsageError
from glmquant.families import Role
from glmquant.plan import Plan, make_plan
from glmquant.recipe import Recipe

# Weights in the linear layers of one layer of ChatGLM2 and 3: qkv, dense, up and gate, down.
LAYER = 4608 * 4096 + 4096 * 4096 + 2 * 13696 * 4096 + 4096 * 13696
# Everything else in half: embedding and head, two norms a layer and one at the end, qkv biases.
REST = 2 * (2 * 65024 * 4096 + (2 * 28 + 1) * 4096 + 28 * 4608)

THREE = "chatglm3-6b"
FULL_SIZE = {
    "chatglm3-int4-g128": (THREE, Recipe(), 28 * (LAYER // 2 + LAYER // 128 * 2 + 6 * 16) + REST),
    "chatglm3-int4-g32": (
        THREE,
        Recipe(group_size=32),
        28 * (LAYER // 2 + LAYER // 32 * 2 + 6 * 16) + REST,
    ),
    "chatglm3-int4-asymmetric": (
        THREE,
        Recipe(symmetric=False),  # with a 4-bit zero point beside each scale
        28 * (LAYER // 2 + LAYER // 128 * 2 + LAYER // 128 // 2 + 6 * 16) + REST,
    ),
    "chatglm3-int8-row": (
        THREE,
        Recipe(bits=8, group_size="row"),
        28 * (LAYER + 2 * (4608 + 4096 + 27392 + 4096) + 6 * 16) + REST,
    ),
    "chatglm3-int4-original-layout": (
        THREE,  # qkv stays one tensor; the stored rotary frequencies stay too
        Recipe(layout="original"),
        28 * (LAYER // 2 + LAYER // 128 * 2 + 4 * 16) + REST + 64,
    ),
    "chatglm3-int4-int8-head": (
        THREE,
        Recipe(quantize_head=True),
        28 * (LAYER // 2 + LAYER // 128 * 2 + 6 * 16) + REST
        - 65024 * 4096 + 65024 * 4096 // 128 * 2 + 16,
    ),
    # What the tensors of the published chatglm2-6b-int4 sum to.
    "chatglm2-int4-thudm": ("chatglm2-6b", Recipe(format="cpm"), 3923601472),
    # Native, GLM-4-9B-chat is what transformers' own conversion of it is.
    "glm4-16-bit": ("glm-4-9b-chat", Recipe(bits=16), 18799902720),
    "glm4-hf-16-bit": ("glm-4-9b-hf", Recipe(bits=16), 18799902720),
    "glm4-0414-16-bit": ("glm-4-9b-0414", Recipe(bits=16), 18800558080),
    "chatglm2-16-bit-original": ("chatglm2-6b", Recipe(bits=16, layout="original"), 12487168064),
    # LayerNorms, stored in float32, become half: 28 * 4 and 2 at the end, of 4096.
    "chatglm-16-bit": (
        "chatglm-6b-2023-03",
        Recipe(bits=16),
        13744473856 - 2 * (28 * 4 + 2) * 4096,
    ),
}  # fmt: skip


def data_bytes(plan: Plan) -> int:
    return sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)


@pytest.mark.parametrize(("name", "recipe", "expected"), FULL_SIZE.values(), ids=FULL_SIZE)
def test_sizes_at_full_size(name: str, recipe: Recipe, expected: int) -> None:
    header = Header.load(name)
    plan = make_plan(HeaderSource(header), recipe)
    assert data_bytes(plan) == expected
    # Files are the tensors and a header of some hundred bytes for each.
    stored = sum(len(shard.tensors) for shard in plan.shards)
    assert 0 < plan.nbytes - expected < 300 * (stored + len(plan.shards))
    buffers = sum(nbytes(*t) for n, t in header.tensors.items() if n.endswith("inv_freq"))
    unread = buffers if plan.recipe.layout == "native" else 0
    assert plan.source_nbytes == header.total_size - unread


@pytest.mark.parametrize("embeddings", [False, True], ids=["linear", "embeddings-too"])
@pytest.mark.parametrize("bits", [4, 8], ids="int{}".format)
def test_thudms_scheme_at_full_size(bits: int, embeddings: bool) -> None:
    header = Header.load("chatglm-6b")
    plan = make_plan(HeaderSource(header), Recipe(bits=bits, quantize_embeddings=embeddings))
    expected = 0
    for name, (dtype, shape) in header.tensors.items():
        ends = name in ("transformer.word_embeddings.weight", "lm_head.weight")
        if len(shape) == 2 and (embeddings or not ends):
            expected += math.prod(shape) * bits // 8 + 2 * shape[0]
        else:
            expected += nbytes("F16" if dtype == "F32" else dtype, shape)
    assert plan.recipe.format == "cpm"
    assert data_bytes(plan) == expected


@pytest.mark.parametrize("name", HEADERS)
def test_only_linear_weights_are_quantized_by_default(name: str) -> None:
    header = Header.load(name)
    plan = make_plan(HeaderSource(header), Recipe())
    for item in plan.items:
        assert (item.scheme is not None) == (item.role is Role.LINEAR), item.name
        if item.scheme is not None:
            assert item.scheme.bits == 4
    layers = [f"layer {n}" for n in range(header.layers)]
    assert [stage.name for stage in plan.stages] == ["input", *layers, "output"]
    dtypes = {tensor.dtype for item in plan.items if item.scheme is None for tensor in item.outputs}
    assert dtypes == {"BF16" if header.config["torch_dtype"] == "bfloat16" else "F16"}


def test_head_and_embedding_are_eight_bit_when_asked_for() -> None:
    recipe = Recipe(quantize_head=True, quantize_embeddings=True)
    plan = make_plan(HeaderSource(Header.load("glm-4-9b-hf")), recipe)
    bits = {item.role: item.scheme.bits for item in plan.items if item.scheme is not None}
    assert bits == {Role.LINEAR: 4, Role.HEAD: 8, Role.EMBEDDING: 8}


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=16), Recipe(format="cpm")], ids=str)
def test_every_row_of_the_source_is_read_once(recipe: Recipe) -> None:
    header = Header.load("chatglm3-6b-32k")
    plan = make_plan(HeaderSource(header), recipe)
    rows = dict.fromkeys(header.tensors, 0)
    for item in plan.items:
        assert item.stop - item.start == item.shape[0]
        assert item.start == rows[item.source]
        rows[item.source] = item.stop
    unread = {name for name, count in rows.items() if count != header.tensors[name][1][0]}
    assert unread <= {"transformer.rotary_pos_emb.inv_freq"}


@pytest.mark.parametrize("limit", ["300MB", "1GB", "4GB", "100GB"])
@pytest.mark.parametrize(("name", "bits"), [(THREE, 4), ("glm-4-9b-chat", 16)])
def test_no_file_is_larger_than_asked_for(name: str, bits: int, limit: str) -> None:
    size = int(limit[:-2]) * 10 ** {"MB": 6, "GB": 9}[limit[-2:]]
    plan = make_plan(HeaderSource(Header.load(name)), Recipe(bits=bits, max_shard_size=size))
    count = len(plan.shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert [s.file for s in plan.shards] == (names if count > 1 else ["model.safetensors"])
    stored = [tensor for shard in plan.shards for tensor in shard.tensors]
    assert stored == [tensor for item in plan.items for tensor in item.outputs]  # each once, in order

    items = {item.outputs[0].name: item for item in plan.items}
    for shard, following in zip(plan.shards, [*plan.shards[1:], None], strict=True):
        alone = len(items[shard.tensors[0].name].outputs) == len(shard.tensors)
        assert shard.nbytes <= size or alone  # a tensor larger than a file cannot be cut
        if following is not None:  # and none is smaller than it need be
            assert shard.nbytes + items[following.tensors[0].name].nbytes > 0.999 * size


def test_the_parts_of_a_weight_stay_in_one_file() -> None:
    plan = make_plan(HeaderSource(Header.load(THREE)), Recipe(max_shard_size=10**7))
    file_of = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    assert len(plan.shards) > 28
    for item in plan.items:
        assert len({file_of[tensor.name] for tensor in item.outputs}) == 1, item.name


@pytest.mark.parametrize("count", [2, 3, 50, 200])
def test_the_limit_counts_the_header_of_a_file(count: int) -> None:
    source = HeaderSource(Header.load(THREE))
    items = list(make_plan(source, Recipe()).items)[:count]
    limit = sum(item.nbytes for item in items)
    assert make_plan(source, Recipe(max_shard_size=limit)).shards[0].nbytes <= limit
    stored = [tensor for item in items for tensor in item.outputs]
    enough = limit + 250 * (len(stored) + 1)
    first = make_plan(source, Recipe(max_shard_size=enough)).shards[0]
    assert first.tensors[: len(stored)] == tuple(stored)


def test_a_group_that_divides_no_width_is_refused_with_those_that_do() -> None:
    header = Header.load(THREE)
    header.config["ffn_hidden_size"] = 13632  # 64 * 213
    for name, (dtype, shape) in header.tensors.items():
        wide = tuple({13696: 13632, 27392: 27264}.get(n, n) for n in shape)
        header.tensors[name] = (dtype, wide)
    with pytest.raises(UsageError, match=r"128 does not divide the 13632 columns of .*down_proj.*64, row"):
        make_plan(HeaderSource(header), Recipe())
    make_plan(HeaderSource(header), Recipe(group_size=64))


def test_a_plan_is_plain_json_and_the_same_every_time() -> None:
    plans = [make_plan(HeaderSource(Header.load("glm-4-9b-chat")), Recipe()) for _ in range(2)]
    assert plans[0].digest() == plans[1].digest()
    assert json.loads(json.dumps(plans[0].to_json())) == plans[0].to_json()
    other = make_plan(HeaderSource(Header.load("glm-4-9b-chat")), Recipe(bits=8))
    assert other.digest() != plans[0].digest()


def test_the_order_of_a_checkpoint_does_not_change_a_plan() -> None:
    header = Header.load(THREE)
    backwards = Header(
        header.model,
        header.config,
        header.total_size,
        header.layers,
        dict(reversed(header.tensors.items())),
    )
    plans = [make_plan(HeaderSource(h), Recipe()) for h in (header, backwards)]
    assert plans[0].digest() == plans[1].digest()
    assert families.FAMILIES[plans[0].family].name == "chatglm2"
