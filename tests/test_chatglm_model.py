"""ChatGLM-6B against what THUDM's own code computed: logits, hidden states, caches, generated ids.

Golden float32 figures are within 2e-4 of exact arithmetic and have a standard deviation of 5 to 9, so 1e-3 is a fair
limit; a bias or LayerNorm weight left out moves a logit by 0.3 or more. Padding is compared nowhere.
"""

from __future__ import annotations

import pytest
import torch
from helpers_chatglm import MODELS, cases, decode, expected, generation, golden_file, load, real_tokens
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from glmquant.models.chatglm import eager_attention
from glmquant.models.chatglm_positions import rotary_tables, rotate, two_row_positions

LIMIT = 1e-3
ATTENTION = ("sdpa", "eager")


def close(ours: Tensor, golden: Tensor, limit: float = LIMIT) -> None:
    assert ours.shape == golden.shape
    error = (ours - golden).abs().max().item()
    assert error <= limit, f"off by {error:.2g}"


def each(quantity: str) -> list[tuple[str, str]]:
    return [(model, case) for model in MODELS for case in cases(model, quantity)]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("name", "case"), each("logits"))
@torch.inference_mode()
def test_logits_with_an_ordinary_mask(name: str, case: str, attention: str) -> None:
    golden, real = expected(name), real_tokens(name, case)
    mask = None if real.all() else real.long()
    logits = load(name, attention)(golden[f"{case}.input_ids"], attention_mask=mask).logits
    close(logits[real], golden[f"{case}.logits"][real])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("name", "case"), each("logits"))
@torch.inference_mode()
def test_logits_with_the_mask_and_positions_of_the_original_code(
    name: str, case: str, attention: str
) -> None:
    golden, real = expected(name), real_tokens(name, case)
    logits = load(name, attention)(
        golden[f"{case}.input_ids"],
        attention_mask=golden[f"{case}.attention_mask"],
        position_ids=golden[f"{case}.position_ids"],
    ).logits
    assert torch.isfinite(logits).all()
    close(logits[real], golden[f"{case}.logits"][real])


@pytest.mark.parametrize(("name", "case"), each("logits"))
def test_positions(name: str, case: str) -> None:
    golden = expected(name)
    positions = two_row_positions(load(name).config, golden[f"{case}.input_ids"], real_tokens(name, case))
    assert torch.equal(positions, golden[f"{case}.position_ids"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(("name", "case"), each("hidden_states"))
@torch.inference_mode()
def test_hidden_states_and_cache(name: str, case: str, attention: str) -> None:
    golden = expected(name)
    output = load(name, attention)(golden[f"{case}.input_ids"], output_hidden_states=True, use_cache=True)
    close(torch.stack(output.hidden_states), golden[f"{case}.hidden_states"])
    last = load(name).config.num_layers - 1
    for layer in (0, last):
        stored = output.past_key_values.layers[layer]
        close(
            stored.keys.permute(2, 0, 1, 3), golden[f"{case}.past_key.{layer}"]
        )  # [length, batch, heads, dim]
        close(stored.values.permute(2, 0, 1, 3), golden[f"{case}.past_value.{layer}"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize(("name", "case"), each("generate.sequences"))
def test_greedy_generation(name: str, case: str, use_cache: bool, attention: str) -> None:
    golden = expected(name)
    written = golden[f"{case}.generate.sequences"]
    prompt = written[:, : -golden[f"{case}.generate.scores"].shape[1]]
    stop = generation(name)[case]["eos_token_id"]
    output = load(name, attention).generate(
        prompt,
        attention_mask=(prompt != 3).long(),
        max_length=written.shape[1],
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=stop if stop is not None else 10**6,  # null there means: never stop
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(output.sequences, written)
    # what a row holds after its stop token is padding
    new = written[:, prompt.shape[1] :]
    running = (new == stop).cumsum(1) - (new == stop).long() == 0 if stop is not None else new >= 0
    close(torch.stack(output.scores, 1)[running], golden[f"{case}.generate.scores"][running])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pieces", [(10, 9), (10, 1, 8), (11, 4, 4)], ids=str)
@torch.inference_mode()
def test_an_answer_in_pieces(name: str, pieces: tuple[int, ...]) -> None:
    """The prompt and then several tokens at once on the cache give what one call gives."""
    golden, model = expected(name), load(name)
    ids, positions = golden["prompt_and_answer.input_ids"], golden["prompt_and_answer.position_ids"]
    cache, logits, start = DynamicCache(), [], 0
    for length in pieces:
        stop = start + length
        output = model(
            ids[:, start:stop], position_ids=positions[..., start:stop], past_key_values=cache, use_cache=True
        )
        logits.append(output.logits)
        start = stop
    close(torch.cat(logits, 1), golden["prompt_and_answer.logits"])


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_shards_as_published(name: str) -> None:
    """float16 ``.bin`` shards hold the same numbers, also by way of transformers."""
    golden, folder = expected(name), golden_file(f"{name}/bin-fp16")
    ids = golden["prompt_and_answer.input_ids"]
    close(decode(folder)(ids).logits, golden["prompt_and_answer.logits"])
    loaded, report = type(load(name)).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded(ids).logits, load(name)(ids).logits)


@pytest.mark.parametrize("variant", ["int4", "int8", "int4-embeddings"])
@torch.inference_mode()
def test_quantized(variant: str) -> None:
    name = f"tiny-3l-{variant}"
    golden, model = expected(name), decode(golden_file(f"{name}/config.json").parent)
    for case in cases(name, "hidden_states"):
        output = model(golden[f"{case}.input_ids"], output_hidden_states=True)
        close(output.logits, golden[f"{case}.logits"])
        close(torch.stack(output.hidden_states), golden[f"{case}.hidden_states"])
    ids, masked = golden["batch_prompts.input_ids"], golden["batch_prompts.attention_mask"]
    real = ids != 3
    assert torch.equal(real, ~masked[:, 0].diagonal(dim1=1, dim2=2))
    logits = model(ids, attention_mask=real.long()).logits
    close(logits[real], golden["batch_prompts.logits"][real])
    output = model.generate(
        golden["prompt.input_ids"],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=10**6,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert torch.equal(output.sequences, golden["prompt.generate.sequences"])
    close(torch.stack(output.scores, 1), golden["prompt.generate.scores"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_half_precision_is_as_near_to_float32_as_the_original(name: str, attention: str) -> None:
    golden = expected(name)
    model = type(load(name)).from_pretrained(
        golden_file(f"{name}/config.json").parent, dtype=torch.float16, attn_implementation=attention
    )
    exact, theirs = golden["prompt_and_answer.logits"], golden["prompt_and_answer.logits_fp16_cpu"].float()
    ours = model(golden["prompt_and_answer.input_ids"]).logits
    assert ours.dtype == torch.float16
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_rotary_tables_and_gelu_of_the_real_head_size() -> None:
    golden = load_file(golden_file("components.safetensors"))
    positions = golden["rope.positions"].expand(1, 2, -1)
    for dtype, name in ((torch.float32, "rope.fp32"), (torch.float16, "rope.fp16")):
        for table, part in zip(rotary_tables(positions, 128, dtype), ("cos", "sin"), strict=True):
            assert table.dtype == dtype
            assert torch.equal(table[0, 0], golden[f"{name}.{part}"].repeat(1, 2))
            chosen = rotary_tables(positions, 128, torch.float32, dtype)[part == "sin"]
            assert torch.equal(chosen[0, 0], golden[f"{name}.{part}"].repeat(1, 2).float())
    cos, sin = rotary_tables(golden["rotate.position_ids"], 128, torch.float32)
    for states in ("query", "key"):
        turned = rotate(
            golden[f"rotate.{states}"].permute(1, 2, 0, 3), cos, sin
        )  # to [batch, heads, length, dim]
        close(turned, golden[f"rotate.{states}_out"].permute(1, 2, 0, 3), 1e-6)
    close(functional.gelu(golden["gelu.input"], approximate="tanh"), golden["gelu.output"], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_half_precision(dtype: torch.dtype) -> None:
    """Products that float16 cannot hold, and that outweigh its lowest number where a mask has it."""
    query = torch.full((1, 1, 3, 128), 180, dtype=dtype)
    key = query.clone()
    key[:, :, 0] = -180
    value = torch.arange(3, dtype=dtype)[None, None, :, None].expand_as(key)
    seen = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    found, weights = eager_attention(torch.nn.Module(), query, key, value, mask, 128**-0.5)
    assert found[0, :, 0, 0].tolist() == expected[0, 0, :, 0].tolist() == [0, 1, 1.5]
    assert (found.dtype, weights[~seen].max()) == (dtype, 0)
