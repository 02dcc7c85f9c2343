"""Tokenizers that are none of THUDM's, but say in a chat template how to talk."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glmquant.errors import UsageError
from glmquant.prompts import TemplatePrompt, prompt_for

WORDS = ["<unk>", "<end>", "user:", "assistant:", "system:", "hello", "there", "be", "brief"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, unk_token="<unk>")
    made.chat_template = template
    return made


def test_ids_are_those_of_the_template() -> None:
    prompt = prompt_for(tokenizer())
    assert isinstance(prompt, TemplatePrompt)
    history = prompt.history([{"role": "system", "content": "be brief"}])
    assert prompt.ids("hello", history) == [4, 7, 8, 1, 2, 5, 1, 3]
    assert prompt.stop_ids() == [1]
    answer, history = prompt.reply(prompt.decode([5, 6, 1]), "hello", history)
    assert answer == "hello there"
    assert [m["role"] for m in history] == ["system", "user", "assistant"]
    assert history[-1]["content"] == "hello there"


def test_shorten() -> None:
    prompt = prompt_for(tokenizer())
    system = {"role": "system", "content": "be brief"}
    said = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    shorter = prompt.shorten([system, *said])
    assert shorter == [system, *said[2:]]
    assert prompt.shorten(shorter) == [system]
    assert prompt.shorten([system]) is None
    assert prompt.shorten([]) is None


@pytest.mark.parametrize(
    "history", [5, "hello", [("hello", "there")], [{"role": "user"}], [{"content": "hello"}]]
)
def test_history_of_the_wrong_form(history: object) -> None:
    with pytest.raises(UsageError):
        prompt_for(tokenizer()).history(history)


def test_a_conversation_that_the_template_refuses() -> None:
    with pytest.raises(UsageError, match="chat template refuses this conversation: no tools"):
        prompt_for(tokenizer()).ids("hello", [], role="tool")


def test_without_a_template_or_an_end() -> None:
    with pytest.raises(UsageError, match=r"is not a tokenizer of ChatGLM-6B.*and has no chat template"):
        prompt_for(tokenizer(template=None))
    with pytest.raises(UsageError, match="states no eos_token"):
        prompt_for(tokenizer(eos=None))
