"""The engine: what a request is answered does not depend on who else asks; limits, ends and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers_serve import Script, ask, tiny_model, tokenizer_of
from transformers import Glm4Config, GlmConfig

from glmquant.models.glm import Glm4ForCausalLM, GlmForCausalLM
from glmquant.prompts import prompt_for
from glmquant.serve.engine import Engine
from glmquant.serve.jobs import Failed, Job, QueueFull, ShuttingDown, TimedOut, Update
from glmquant.serve.runners import SerialRunner, SlotRunner
from glmquant.serve.sampling import Sampling

VOCAB = 1000
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "pad_token_id": 0, "eos_token_id": None, "partial_rotary_factor": 0.5,
}  # fmt: skip


def spell(ids: Any) -> str:
    """Ids as text, so that answers can be compared exactly."""
    return "".join(f"{row} " for row in ids)


def random_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = GlmForCausalLM(GlmConfig(**SIZES)) if kind == "glm" else Glm4ForCausalLM(Glm4Config(**SIZES))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 90, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def alone(model: Any, ids: list[int], new: int = 16) -> str:
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return spell(output[0, len(ids) :].tolist())


@contextmanager
def running(runner: Any, **options: Any) -> Iterator[Engine]:
    engine = Engine(runner, options.pop("decode", spell), 5, **options)
    engine.start()
    try:
        yield engine
    finally:
        if isinstance(runner, Script):
            runner.gate.set()
        engine.stop(30)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_answers_are_those_of_generate(kind: str, chunk: int) -> None:
    """Ten requests of all lengths in three slots, with prompts read in chunks of any size."""
    model, asked = random_model(kind), prompts(10)
    wanted = [alone(model, ids) for ids in asked]
    with running(SlotRunner(model, 3, 128, chunk)) as engine:
        heard = [ask(engine, ids)[1] for ids in asked]
        assert [each.last().text for each in heard] == wanted
        assert {each.last().finish for each in heard} == {"length"}
        assert {each.last().tokens for each in heard} == {16}


def test_a_newcomer_does_not_change_an_answer() -> None:
    model, (long, *others) = random_model("glm"), prompts(6, seed=2)
    wanted = alone(model, long, 60)
    with running(SlotRunner(model, 6, 160, 8)) as engine:
        _, first = ask(engine, long, 60)
        for ids in others:
            while len(first.updates) < 5 * (1 + others.index(ids)):
                time.sleep(0.001)
            ask(engine, ids, 5)
        assert first.last().text == wanted


def test_seeds_are_the_request_s_own() -> None:
    """The same seed gives the same answer, alone and among others; another seed another."""
    model, (ids, *others) = random_model("glm"), prompts(5, seed=3)
    sampling = Sampling(1.0, 0.9, seed=7)
    with running(SlotRunner(model, 5, 128, 32)) as engine:
        single = ask(engine, ids, sampling=sampling)[1].last().text
        crowd = [ask(engine, other, 40, sampling=Sampling(1.0, 1.0))[1] for other in others]
        again = ask(engine, ids, sampling=sampling)[1].last().text
        other_seed = ask(engine, ids, sampling=Sampling(1.0, 0.9, seed=8))[1].last().text
        for each in crowd:
            each.last()
    assert single == again != other_seed


def test_what_a_slot_holds_is_used_again() -> None:
    """The next turn of a conversation computes only what is new, and is answered the same."""
    model, ids = random_model("glm"), prompts(1, seed=4)[0]
    with running(SlotRunner(model, 2, 200, 32)) as engine:
        first = ask(engine, ids)[1].last()
        turn = ids + [int(row) for row in first.text.split()] + [7, 8, 9]
        second = ask(engine, turn)[1].last()
        changed = [*turn[:10], 999, *turn[11:]]
        third = ask(engine, changed)[1].last()
    # The last token of an answer was never computed.
    assert (first.reused, second.reused, third.reused) == (0, len(turn) - 4, 10)
    judge = random_model("glm")
    assert second.text == alone(judge, turn)
    assert third.text == alone(judge, changed)


def test_a_beginning_that_others_have_is_copied() -> None:
    """From a slot that is answering, too; and a conversation keeps its slot while another is free."""
    model, ids = random_model("glm"), prompts(1, seed=5)[0]
    asked = [[*ids, *more] for more in prompts(3, seed=6)]
    wanted = [alone(model, each) for each in asked]
    with running(SlotRunner(model, 3, 250, 32)) as engine:
        job, first = ask(engine, [*ids, 1, 2], 100)
        while not first.updates:
            time.sleep(0.001)
        heard = [ask(engine, each)[1].last() for each in asked]
        engine.cancel(job)
    assert [each.reused for each in heard] == [len(ids)] * 3
    assert [each.text for each in heard] == wanted


def test_chatglm_6b_is_served_one_at_a_time() -> None:
    prompt = prompt_for(tokenizer_of("chatglm-6b"))
    model = tiny_model("chatglm-6b")
    asked = [prompt.ids(text, []) for text in ("hello", "the quick brown fox", "你好")]
    wanted = []
    for ids in asked:
        output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        wanted.append(spell(output[0, len(ids) :].tolist()))
    with running(SerialRunner(model, 128)) as engine:
        heard = [ask(engine, ids, 12)[1] for ids in asked]
        assert [each.last().text for each in heard] == wanted


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_tiny_checkpoints_end_at_their_stop_ids(name: str) -> None:
    prompt, model = prompt_for(tokenizer_of(name)), tiny_model(name)
    ids, stops = prompt.ids("hello", []), prompt.stop_ids()
    output = model.generate(
        torch.tensor([ids]),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=stops,
        top_p=None,
        temperature=None,
    )
    wanted = [row for row in output[0, len(ids) :].tolist() if row not in stops]
    with running(SlotRunner(model, 2, 128, 32)) as engine:
        last = ask(engine, ids, 40, stop_ids=frozenset(stops))[1].last()
    assert last.text == spell(wanted)


# Sampling


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_is_transformers_s(penalty: float) -> None:
    """Each request its own, over prompt and answer."""
    model, asked = random_model("glm"), prompts(3, seed=9)
    wanted = [
        spell(
            model.generate(
                torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0,
                repetition_penalty=penalty,
            )[0, len(ids) :].tolist()
        )
        for ids in asked
    ]  # fmt: skip
    plain = alone(model, asked[0])
    assert plain != wanted[0]
    with running(SlotRunner(model, 4, 128, 16)) as engine:
        heard = [ask(engine, ids, sampling=Sampling(0, 1, None, penalty))[1] for ids in asked]
        other = ask(engine, asked[0])[1]
        assert [each.last().text for each in heard] == wanted
        assert other.last().text == plain


# Ends, limits, failures; with a script for a model


def words(*ids: int, **options: Any) -> Script:
    return Script(lambda prompt: ids, 0, 100, **options)


def letters(ids: Any) -> str:
    return "".join(chr(96 + row) for row in ids)


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("c",), "ab", 3),
        (("bcd",), "a", 4),
        (("zz", "de", "d"), "abc", 4),
        ((), "abcdef", 7),
        (("bx",), "abcdef", 7),
    ],
)
def test_stop_texts(stop: tuple[str, ...], text: str, tokens: int) -> None:
    with running(words(1, 2, 3, 4, 5, 6), decode=letters) as engine:
        last = ask(engine, [9], stop=stop, stop_ids=frozenset({0}))[1].last()
    assert (last.text, last.tokens, last.finish) == (text, tokens, "stop")


def test_a_cancelled_request_is_forgotten_and_its_slot_used() -> None:
    runner = words(*range(1, 90), slots=1, delay=0.002)
    with running(runner) as engine:
        job, heard = ask(engine, [9], 90)
        _, waiting = ask(engine, [8], 3)
        while not heard.updates:
            time.sleep(0.001)
        engine.cancel(job)
        assert waiting.last().finish == "length"
        count = len(heard.updates)
        assert heard.updates[-1].finish is None
        assert count < 89


def test_time_limits_hold_in_the_queue_and_in_a_slot() -> None:
    runner = words(*range(1, 90), slots=1, delay=0.01)
    with running(runner) as engine:
        _, first = ask(engine, [9], 90, deadline=time.monotonic() + 0.2)
        _, second = ask(engine, [9], 3, deadline=time.monotonic() + 0.1)
        _, third = ask(engine, [9], 3)
        assert isinstance(first.last().error, TimedOut)
        assert isinstance(second.last().error, TimedOut)
        assert third.last().finish == "length"


def test_the_queue_is_bounded() -> None:
    runner = words(1, slots=2)
    runner.gate.clear()
    with running(runner, queue=3) as engine:
        heard = [ask(engine, [9], 1)[1] for _ in range(5)]
        with pytest.raises(QueueFull):
            ask(engine, [9], 1)
        runner.gate.set()
        assert [each.last().finish for each in heard] == ["length"] * 5
        assert ask(engine, [9], 1)[1].last().finish == "length"


def test_draining_finishes_what_runs_and_refuses_what_waits() -> None:
    runner = words(1, 2, 3, slots=1)
    runner.gate.clear()
    with running(runner) as engine:
        _, runs = ask(engine, [9], 3)
        while not engine.running:
            time.sleep(0.001)
        _, waits = ask(engine, [9], 3)
        engine.drain()
        assert isinstance(waits.last().error, ShuttingDown)
        with pytest.raises(ShuttingDown):
            ask(engine, [9], 3)
        runner.gate.set()
        assert runs.last().finish == "length"
        assert engine.idle


def test_a_request_that_breaks_the_model_harms_no_other() -> None:
    runner = words(1, 2, 3, poison=66)
    runner.gate.clear()
    with running(runner, decode=letters) as engine:
        good = [ask(engine, [9], 3)[1] for _ in range(2)]
        bad = ask(engine, [66], 3)[1]
        runner.gate.set()
        assert isinstance(bad.last().error, Failed)
        assert [each.last().text for each in good] == ["abc", "abc"]
        assert ask(engine, [9], 3)[1].last().text == "abc"


def test_a_text_that_cannot_be_decoded_harms_no_other() -> None:
    def decode(ids: Any) -> str:
        if 2 in ids:
            raise ValueError("no text")
        return letters(ids)

    with running(Script(lambda prompt: prompt, 0, 100), decode=decode) as engine:
        bad, good = ask(engine, [1, 2], 5)[1], ask(engine, [1, 3], 2)[1]
        assert isinstance(bad.last().error, Failed)
        assert good.last().text == "ac"


def test_numbers_that_are_none_give_the_harmless_token() -> None:
    class Broken(Script):
        def step(self, pieces: Any) -> torch.Tensor:
            return super().step(pieces) * torch.nan

    with running(Broken(lambda prompt: [1], 0, 100), decode=letters) as engine:
        assert ask(engine, [9], 3)[1].last().text == letters([5, 5, 5])


@pytest.mark.parametrize(
    ("error", "requests"),
    [(RuntimeError("some reason"), 3), (RuntimeError("CUDA error: an illegal memory access"), 1),
     (torch.AcceleratorError("gone"), 1)],
    ids=["any", "cuda", "accelerator"],
)  # fmt: skip
def test_a_model_that_always_fails_ends_the_engine(error: Exception, requests: int) -> None:
    class Broken(Script):
        def step(self, pieces: Any) -> torch.Tensor:
            if pieces[0].ids == [9]:
                raise error
            return super().step(pieces)

    with running(Broken(lambda prompt: [1], 0, 100), decode=letters) as engine:
        for _ in range(2 if requests > 1 else 0):  # not in a row
            assert isinstance(ask(engine, [9])[1].last().error, Failed)
            assert ask(engine, [8], 1)[1].last().text == "a"
        for _ in range(requests):
            assert engine.failed is None
            assert isinstance(ask(engine, [9])[1].last().error, Failed)
        engine._thread.join(10)
        assert engine.failed
        with pytest.raises(Failed):
            ask(engine, [8])


def test_others_can_queue_while_a_beginning_is_copied() -> None:
    """The event loop must never wait for the model."""
    copying, queued = threading.Event(), threading.Event()
    free: list[bool] = []

    class Slow(Script):
        def copy(self, source: int, target: int, count: int) -> None:
            copying.set()
            free.append(queued.wait(10))

    runner = Slow(lambda prompt: [1] * 50, 0, 100, reuses=True, delay=0.01)
    with running(runner, decode=letters) as engine:
        job, first = ask(engine, [9, 8, 7, 6], 50)
        while not first.updates:
            time.sleep(0.001)
        _, second = ask(engine, [9, 8, 7, 5], 2)
        assert copying.wait(10)
        _, third = ask(engine, [3], 2)
        engine.cancel(job)
        queued.set()
        assert {second.last().finish, third.last().finish} == {"length"}
    assert free[0]


def test_an_engine_that_dies_tells_everybody() -> None:
    runner = words(1)
    runner.gate.clear()
    engine = Engine(runner, letters, 5)
    engine._plan = None  # type: ignore[method-assign,assignment]
    engine.start()
    assert isinstance(ask(engine, [9])[1].last().error, Failed)
    with pytest.raises(Failed):
        ask(engine, [9])
    engine.stop(5)


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    """While it is read, those who answer get a token a step, and a short newcomer its turn."""
    order: list[str] = []
    runner = Script(lambda prompt: [1] * 40, 0, 100, slots=3, context=4000, chunk=16)
    runner.gate.clear()
    with running(runner, decode=letters) as engine:
        jobs = {"long": [9] * 1000, "short": [9] * 4, "other": [8] * 4}
        done = threading.Semaphore(0)
        for name, ids in jobs.items():

            def note(update: Update, name: str = name) -> None:
                order.append(name)
                done.release()

            engine.reserve()
            engine.submit(Job(ids, 1, Sampling(0, 1), frozenset(), (), note))
        runner.gate.set()
        assert all(done.acquire(timeout=30) for _ in jobs)
    assert order[2] == "long"


def test_steps_hold_many_requests() -> None:
    runner = words(*range(1, 30), slots=8)
    runner.gate.clear()
    with running(runner) as engine:
        heard = [ask(engine, [9], 30)[1] for _ in range(8)]
        runner.gate.set()
        for each in heard:
            each.last()
    assert runner.largest == 8


def test_stopping_tells_what_runs() -> None:
    runner = words(*range(1, 90), delay=0.01)
    with running(runner) as engine:
        _, heard = ask(engine, [9], 90)
        while not heard.updates:
            time.sleep(0.001)
        engine.stop(10)
        assert isinstance(heard.last().error, ShuttingDown)
