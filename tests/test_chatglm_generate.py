"""ChatGLM-6B under transformers' machinery: generate's modes, masks, training, saving, offload, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers_chatglm import expected, load
from helpers_formats import GOLDEN, load_json
from torch import Tensor
from transformers import DynamicCache, StaticCache

from glmquant import families
from glmquant.errors import SourceError, UsageError
from glmquant.models.chatglm import ChatGLMForConditionalGeneration
from glmquant.models.chatglm_config import ChatGLMConfig

NAME = "tiny-3l"
MASK, GMASK, SOP, PAD = 240, 241, 244, 3


@pytest.fixture
def model() -> ChatGLMForConditionalGeneration:
    return load(NAME)


@pytest.fixture
def golden() -> dict[str, Tensor]:
    return expected(NAME)


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Ids with 12 new ones."""
    return model.generate(ids, **{"max_new_tokens": 12, "do_sample": False, "eos_token_id": 10**6} | options)


def test_special_ids_and_stop_come_from_the_config(model: Any) -> None:
    assert (model.config.bos_token_id, model.config.gmask_token_id, model.config.mask_token_id) == (
        SOP,
        GMASK,
        MASK,
    )
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (245, PAD)
    assert model.config.max_position_embeddings == 2048


def test_every_row_of_a_padded_batch_is_as_if_alone(model: Any, golden: dict[str, Tensor]) -> None:
    ids = golden["batch_prompts.input_ids"]
    written = greedy(model, ids)  # the mask is inferred from the padding
    for row, alone in enumerate(ids):
        prompt = alone[alone != PAD][None]
        assert torch.equal(written[row, ids.shape[1] :], greedy(model, prompt)[0, prompt.shape[1] :])


def test_the_tokenizers_mask_and_positions_in_generate(model: Any, golden: dict[str, Tensor]) -> None:
    ids = golden["batch_prompts.input_ids"]
    masked, positions = golden["batch_prompts.attention_mask"], golden["batch_prompts.position_ids"]
    written = golden["batch_prompts.generate.sequences"][:, : ids.shape[1] + 12]
    assert torch.equal(greedy(model, ids, attention_mask=masked, position_ids=positions), written)
    assert torch.equal(greedy(model, ids, attention_mask=masked[:, 0]), written)
    strange = masked.clone()
    strange[0, 0, -1, 2] = True
    with pytest.raises(UsageError, match="cannot follow this attention_mask"):
        greedy(model, ids, attention_mask=strange)


@torch.inference_mode()
def test_given_positions_are_continued_in_row_1(model: Any, golden: dict[str, Tensor]) -> None:
    """As with the tokenizer's padding code, which takes [MASK] for the position where the model takes [gMASK]."""
    ids = golden["mask_and_gmask.input_ids"]
    positions = golden["mask_and_gmask.position_ids"].clone()
    start = ids[0].tolist().index(SOP)
    positions[:, 0, start:] = ids[0].tolist().index(MASK)
    written = greedy(model, ids, position_ids=positions)
    assert not torch.equal(written, greedy(model, ids))
    while ids.shape[1] < written.shape[1]:
        last = positions[..., -1:] + torch.tensor([[0], [1]])
        ids = torch.cat((ids, model(ids, position_ids=positions).logits[:, -1:].argmax(-1)), 1)
        positions = torch.cat((positions, last), -1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("prompt", {"cache_implementation": "static"}),
        ("batch_prompts", {"cache_implementation": "static"}),
        ("prompt", {"prompt_lookup_num_tokens": 3}),
        ("mask_in_middle", {"prompt_lookup_num_tokens": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_other_ways_to_generate_write_the_same(
    model: Any, golden: dict[str, Tensor], case: str, options: dict[str, Any]
) -> None:
    ids = golden[f"{case}.input_ids"]
    assert torch.equal(greedy(model, ids, **options), greedy(model, ids))


@torch.inference_mode()
def test_static_cache_with_padding_in_forward(model: Any, golden: dict[str, Tensor]) -> None:
    ids, real = golden["batch_prompts_answers.input_ids"], golden["batch_prompts_answers.valid"]
    cache = StaticCache(config=model.config, max_cache_len=32)
    logits = model(ids, attention_mask=real.long(), past_key_values=cache).logits
    assert (logits - golden["batch_prompts_answers.logits"])[real].abs().max() < 1e-3


def test_beams_and_several_answers(model: Any, golden: dict[str, Tensor]) -> None:
    ids = golden["batch_prompts.input_ids"]
    cached, uncached = (greedy(model, ids, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    torch.manual_seed(0)
    several = greedy(model, ids, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, greedy(model, ids).repeat_interleave(2, 0))


@torch.inference_mode()
def test_embeddings_in_place_of_ids(model: Any, golden: dict[str, Tensor]) -> None:
    ids, positions = golden["prompt.input_ids"], golden["prompt.position_ids"]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, position_ids=positions).logits, model(ids).logits)
    written = model.generate(
        inputs_embeds=embeds, position_ids=positions, max_new_tokens=12, do_sample=False, eos_token_id=10**6
    )
    assert torch.equal(written, greedy(model, ids)[:, ids.shape[1] :])
    with pytest.raises(UsageError, match="position_ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


@torch.inference_mode()
def test_padding_on_the_right_changes_nothing(model: Any, golden: dict[str, Tensor]) -> None:
    ids = golden["prompt_and_answer.input_ids"]
    padded = torch.cat((ids, torch.full((1, 4), PAD)), 1)
    logits = model(padded, attention_mask=(padded != PAD).long()).logits[:, : ids.shape[1]]
    assert (logits - golden["prompt_and_answer.logits"]).abs().max() < 1e-3


@torch.inference_mode()
def test_attention_weights_show_the_prefix_mask(golden: dict[str, Tensor]) -> None:
    ids = golden["prompt_and_answer.input_ids"]
    context = ids[0].tolist().index(SOP)
    weights = load(NAME, "eager")(ids, output_attentions=True).attentions
    assert len(weights) == 3
    seen = weights[0][0].sum(0) > 0
    causal = torch.ones_like(seen).tril()
    causal[:, :context] = True
    assert torch.equal(seen, causal)


def bad_calls() -> dict[str, tuple[str, Callable[[Any, dict[str, Tensor]], Any]]]:
    """What is called, and what the message has to say."""

    def prompt(golden: dict[str, Tensor]) -> Tensor:
        return golden["prompt.input_ids"].clone()

    def replaced(golden: dict[str, Tensor], old: int, new: int) -> Tensor:
        ids = prompt(golden)
        ids[ids == old] = new
        return torch.cat((prompt(golden), ids))

    return {
        "no-sop": (r"row 1 .* no <sop> \(id 244\)", lambda m, g: m(replaced(g, SOP, 9))),
        "no-mask": (r"row 1 .* neither \[gMASK\]", lambda m, g: m(replaced(g, GMASK, 9))),
        "no-sop-generate": ("no <sop>", lambda m, g: m.generate(replaced(g, SOP, 9))),
        "id-too-large": ("holds 256, .* ids 0 to 255", lambda m, g: m(replaced(g, 173, 256))),
        "id-negative": ("holds -1, ", lambda m, g: m.generate(replaced(g, 173, -1), max_new_tokens=2)),
        "too-long": (
            "2056 tokens and this model takes 2048",
            lambda m, g: m(torch.cat((torch.full((1, 2040), 5), prompt(g)), 1)),
        ),
        "one-row-of-positions": (
            r"shape \[1, 16\]; .* \[batch, 2, 16\]",
            lambda m, g: m(prompt(g), position_ids=torch.arange(16)[None]),
        ),
        "nothing": ("either input_ids or inputs_embeds", lambda m, g: m()),
        "short-mask": (
            r"attention_mask has shape \[1, 15\]",
            lambda m, g: m(prompt(g), attention_mask=torch.ones(1, 15)),
        ),
        "prompt-in-chunks": (
            "in one piece",
            lambda m, g: m.generate(prompt(g), prefill_chunk_size=5, max_new_tokens=2),
        ),
        "cache-without-positions": ("position_ids", continue_without_positions),
    }


def continue_without_positions(model: Any, golden: dict[str, Tensor]) -> None:
    cache = model(golden["prompt.input_ids"], use_cache=True, past_key_values=DynamicCache()).past_key_values
    model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(model: Any, golden: dict[str, Tensor], name: str) -> None:
    message, call = bad_calls()[name]
    with pytest.raises(UsageError, match=message):
        call(model, golden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"vocab_size": None}, "vocab"),
        ({"num_attention_heads": 0}, "bad value"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_no_known_model(change: dict[str, Any], message: str) -> None:
    config = ChatGLMConfig(**load_json(GOLDEN / f"chatglm-6b/{NAME}/config.json") | change)
    with pytest.raises(SourceError, match=message):
        ChatGLMForConditionalGeneration(config)


def test_unknown_rotary_dtype() -> None:
    with pytest.raises(UsageError, match="rotary_dtype"):
        ChatGLMConfig(rotary_dtype="int8")


@torch.inference_mode()
def test_bfloat16_and_a_chosen_rotary_dtype(model: Any, golden: dict[str, Tensor]) -> None:
    exact = golden["prompt_and_answer.logits"]
    for dtype, angles, limit in ((torch.bfloat16, None, 0.5), (torch.float32, "float16", 0.05)):
        config = ChatGLMConfig(**load_json(GOLDEN / f"chatglm-6b/{NAME}/config.json"), rotary_dtype=angles)
        other = ChatGLMForConditionalGeneration(config)
        other.load_state_dict(model.state_dict())
        logits = other.to(dtype).eval()(golden["prompt_and_answer.input_ids"]).logits.float()
        assert not torch.equal(logits, exact)
        assert (logits - exact).abs().mean() < limit


def test_names_are_those_of_the_checkpoint(model: Any) -> None:
    config = load_json(GOLDEN / f"chatglm-6b/{NAME}/config.json")
    family = families.detect(config)
    table = {
        spec.name: spec.shape for spec in family.tensors(family.dims(config)) if spec.role.value != "buffer"
    }
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == table
    assert not list(model.buffers())
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_saved_and_loaded_again(model: Any, golden: dict[str, Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = load_json(tmp_path / "config.json")
    published = load_json(GOLDEN / f"chatglm-6b/{NAME}/config.json")
    shared = set(published) - {
        "architectures",
        "auto_map",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
    assert {key: config[key] for key in shared} == {key: published[key] for key in shared}
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(golden["prompt.input_ids"]).logits, model(golden["prompt.input_ids"]).logits)


def test_device_map_and_offload(golden: dict[str, Tensor], tmp_path: Path) -> None:
    """Layers on disk are fetched as they are needed; with GPUs the same hooks move activations between them."""
    parts = {f"transformer.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    offloaded = ChatGLMForConditionalGeneration.from_pretrained(
        GOLDEN / f"chatglm-6b/{NAME}",
        dtype=torch.float32,
        device_map={
            "transformer.word_embeddings": "cpu",
            "transformer.final_layernorm": "cpu",
            "lm_head": "cpu",
        }
        | parts,
        offload_folder=tmp_path,
    )
    assert offloaded.transformer.layers[2].mlp.dense_h_to_4h.weight.is_meta
    ids = golden["prompt.input_ids"]
    assert torch.equal(greedy(offloaded, ids), greedy(load(NAME), ids))


def fresh() -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(GOLDEN / f"chatglm-6b/{NAME}", dtype=torch.float32)


def test_loss_and_gradients_also_with_checkpointing(golden: dict[str, Tensor]) -> None:
    ids = golden["prompt_and_answer.input_ids"]
    labels = ids.clone()
    labels[:, : ids[0].tolist().index(SOP) + 1] = -100
    model = fresh().train()
    loss = model(ids, labels=labels).loss
    likely = golden["prompt_and_answer.logits"][:, :-1].log_softmax(-1)
    chosen = likely.gather(-1, ids[:, 1:, None])[..., 0][labels[:, 1:] != -100]
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-4)
    loss.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=labels).loss.backward()
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor.grad, gradients[name], atol=1e-5), name


def test_lora(golden: dict[str, Tensor], tmp_path: Path) -> None:
    """A fine-tune saved beside its base loads again and merges."""
    ids = golden["prompt_and_answer.input_ids"]
    torch.manual_seed(0)
    tuned = peft.get_peft_model(
        fresh(), peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False)
    )
    logits = tuned(ids).logits
    assert not torch.allclose(logits, golden["prompt_and_answer.logits"], atol=0.01)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert torch.allclose(again.merge_and_unload()(ids).logits, logits, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["chatglm-6b", "chatglm-6b-int4", "chatglm2-6b", "chatglm3-6b", "chatglm3-6b-32k", "glm-4-9b-chat"],
)
def test_published_configs(name: str) -> None:
    published = load_json(GOLDEN / f"published-configs/{name}.json")
    config, dims = ChatGLMConfig(**published), families.detect(published).dims(published)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        dims.layers,
        dims.hidden,
        dims.vocab,
    )
    assert config.max_position_embeddings == dims.context
    assert config.tie_word_embeddings == dims.tied_head
    saved = config.to_diff_dict()
    left_out = {"use_cache", "torch_dtype", "_name_or_path", "transformers_version", "attn_implementation"}
    # what equals a default is left out of a diff
    assert all(saved.get(key, getattr(config, key)) == published[key] for key in set(published) - left_out)
    assert families.detect(saved).name == families.detect(published).name


def test_first_release() -> None:
    """Its config.json has no ids for [MASK] and [gMASK]; the vocabulary had 20000 image tokens in front."""
    published = load_json(GOLDEN / "headers/chatglm-6b-2023-03.json")["config"]
    assert "mask_token_id" not in published
    config = ChatGLMConfig(**published)
    assert (config.mask_token_id, config.gmask_token_id, config.bos_token_id) == (150000, 150001, 150004)
