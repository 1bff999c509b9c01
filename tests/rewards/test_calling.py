"""TRL's calling convention: what functions are handed, what they may be, and asynchronous ones."""

import asyncio
import contextlib
import functools
import gc
import math
import re
import threading
import time
import warnings
from dataclasses import fields

import pytest
import torch
from transformers import TrainerState as TransformersState

from lit_rlhf import GRPO
from lit_rlhf.data import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import RewardFunctions, TrainerState, exact_match, regex_format
from lit_rlhf.types import SamplingConfig
from tests.helpers import NumberTokenizer, tiny_model, trainer

PROMPTS, COMPLETIONS, IDS = ["1+1=", "1+2=", "1+3="], ["2", "3", "5"], [[1], [2], [3]]
COLUMNS = {"answer": ["2", "3", "4"]}
CHAT = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def score(funcs, weights=None, prompts=PROMPTS, **keywords):
    return RewardFunctions(funcs, weights, **keywords)(prompts, COMPLETIONS, IDS, COLUMNS)


def refusal(funcs, **keywords):
    with pytest.raises(InputError) as caught:
        score(funcs, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# what they are handed


def test_completions_of_chat_prompts_are_messages():
    def check(prompts, completions):
        assert prompts == CHAT
        assert completions == [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
        return [1, 2, 3]

    assert score(check, prompts=CHAT)[0].tolist() == [1, 2, 3]
    assert score(exact_match, prompts=CHAT)[0].tolist() == [1, 1, 0]


def test_functions_cannot_change_messages_or_ids_that_others_see():
    def vandal(prompts, completions, completion_ids, trainer_state):
        prompts[0].append("x")
        prompts[1][0]["content"] = completions[0][0]["content"] = "x"
        completion_ids[0].append(7)
        return [0, 0, 0]

    def witness(prompts, completions, completion_ids):
        assert (prompts, completions[0][0]["content"], completion_ids) == (CHAT, "2", [[1], [2], [3]])
        return [1, 1, 1]

    assert score([vandal, witness], prompts=CHAT)[0].tolist() == [1, 1, 1]
    assert [len(prompt) for prompt in CHAT] == [1, 1, 1]


def test_what_functions_log_is_kept_by_function_and_until_the_next_call():
    def one(completions, log_metric, log_extra):
        log_metric("rate", 0.5)
        log_metric("rate", torch.tensor(1.5))
        log_extra("text", completions)
        return [0, 0, 0]

    def two(completions, log_metric, **kwargs):
        log_metric("rate", 7)
        return [0, 0, 0]

    rewards = RewardFunctions([one, two])
    for _ in range(2):
        rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
        assert rewards.metrics == {"one/rate": [0.5, 1.5], "two/rate": [7.0]}
        assert rewards.extras == {"one/text": COMPLETIONS}


def test_what_is_logged_is_a_number():
    def wrong(log_metric, **kwargs):
        log_metric("rate", "high")

    assert "reward function wrong logged 'high' as 'rate'; expected a finite number" in refusal(wrong)


def test_the_state_of_training_is_told():
    seen = []

    def look(trainer_state, completions, **kwargs):
        assert trainer_state.is_world_process_zero
        state = trainer_state
        seen.append((state.global_step, state.epoch, state.max_steps, state.num_train_epochs))
        return [0.0] * len(completions)

    rows = [{"prompt": f"{2 + i}"} for i in range(8)]
    sizes = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 2, "sampling": SamplingConfig(max_new_tokens=3)}
    module = GRPO(policy=tiny_model(), tokenizer=NumberTokenizer(), reward_funcs=[look], **sizes)
    trainer(max_epochs=3).fit(module, datamodule=RowsDataModule(rows))
    assert seen == [(0, 0.0, 6, 2), (2, 0.5, 6, 2), (4, 1.0, 6, 2)]  # one and a half passes: the second is begun
    assert RewardFunctions(look).trainer_state == TrainerState(0, 0.0, -1, 0)
    assert {field.name for field in fields(TrainerState)} <= {field.name for field in fields(TransformersState)}


@pytest.mark.parametrize(("weights", "applies"), [([1.0, 0.0], False), ([1.0, 1.0], True)])
def test_a_rollout_without_any_reward_is_warned_of(weights, applies):
    def never(completions, **kwargs):
        return [None] * len(completions)

    def once(completions, **kwargs):
        return [1.0] + [None] * (len(completions) - 1)

    sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=3)}
    sizes |= {"policy": tiny_model(), "tokenizer": NumberTokenizer(), "reward_weights": weights}
    module = GRPO(reward_funcs=[never, once], **sizes)
    with warnings.catch_warnings(record=True) as caught:
        trainer(max_epochs=2).fit(module, datamodule=RowsDataModule([{"prompt": f"{2 + i}"} for i in range(8)]))
    sentences = [str(w.message) for w in caught if "no completion of a rollout has a reward" in str(w.message)]
    assert bool(sentences) is not applies
    assert all("the reward functions (never, once) returned None" in sentence for sentence in sentences)


# what they may be


def scaled(completions, factor, answer="mine"):
    assert answer == "mine"
    return [factor * float(c) for c in completions]


class Judge:
    def __init__(self, offset=0.0):
        self.offset = offset

    def __call__(self, completions, **kwargs):
        return [float(c) + self.offset for c in completions]


class AsyncJudge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(c) for c in completions]


HERE = __name__


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules.get(HERE) or __import__(HERE, fromlist=["x"]))


@pytest.mark.parametrize(
    ("fn", "name", "expected"),
    [
        (functools.partial(scaled, factor=2, answer="mine"), "scaled", [4, 6, 10]),  # what is fixed stays so
        (Judge(1.0), "Judge", [3, 4, 6]),
        (Judge, "Judge", [2, 3, 5]),
        (AsyncJudge(), "AsyncJudge", [2, 3, 5]),
        (AsyncJudge, "AsyncJudge", [2, 3, 5]),
        (Judge().__call__, "__call__", [2, 3, 5]),
        (regex_format("[23]"), "regex_format", [1, 1, 0]),
        ({"_target_": "lit_rlhf.rewards.regex_format", "pattern": "[23]"}, "regex_format", [1, 1, 0]),
        ({"_target_": "lit_rlhf.rewards.exact_match"}, "exact_match", [1, 1, 0]),
        ({"_target_": f"{HERE}.Judge", "offset": 2}, "Judge", [4, 5, 7]),
        ({"_target_": f"{HERE}.scaled", "factor": 3, "answer": "mine"}, "scaled", [6, 9, 15]),
        (f"{HERE}.Judge", "Judge", [2, 3, 5]),
    ],
)
def test_kinds_of_functions(fn, name, expected):
    rewards = RewardFunctions(fn)
    assert rewards.names == [name.strip("_")]
    assert rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)[0].tolist() == expected


class Demanding:
    def __init__(self, wanted):
        self.wanted = wanted

    def __call__(self, completions):
        return []


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (Demanding, "reward function Demanding: making it raised TypeError: .*'wanted'; give its arguments beside its"),
        ({"_target_": f"{HERE}.Demanding"}, "Demanding: making it raised TypeError"),
        ({"_target_": "lit_rlhf.rewards.regex_format", "pattern": "("}, "'\\(' is no regular expression, missing \\)"),
        ({"_target_": "lit_rlhf.rewards.regex_fromat", "pattern": "a"}, "no function 'regex_fromat'; the nearest is"),
        ({"_target_": "builtins.len"}, "making it raised TypeError"),
        ({"_target_": "builtins.dict", "a": 1}, "reward function builtins.dict made a dict; expected something that"),
        ({"pattern": "a"}, "a reward function's node needs a _target_, an import path; got {'pattern': 'a'}"),
        (regex_format, "reward function regex_format needs 'pattern', which the data does not have"),
        (
            lambda **_: exact_match,
            "returned a function; expected a list .*lambda makes reward functions, so give",
        ),
    ],
)
def test_what_does_not_make_a_reward_function_is_refused(fn, message):
    assert re.search(message, refusal(fn)), refusal(fn)


# weights


def sometimes(*values):
    def reward(**_):
        return list(values)

    return reward


def test_where_only_watched_functions_apply_there_is_no_reward():
    total, parts = score([sometimes(1, None, None), sometimes(5, 6, None)], [2, 0])
    torch.testing.assert_close(total, torch.tensor([2, math.nan, math.nan]), equal_nan=True)
    torch.testing.assert_close(parts[:, 1], torch.tensor([5, 6, math.nan]), equal_nan=True)


def test_weights_that_are_all_zero_are_refused():
    assert "reward weights: all of them are 0, and nothing could be learnt" in refusal([exact_match], weights=[0])


# asynchronous functions


def test_asynchronous_functions_run_at_the_same_time_and_in_order_of_their_names():
    meeting = {}

    def meets(number):
        async def judge(completions, **kwargs):
            event = meeting.setdefault(number, asyncio.Event())
            other = meeting.setdefault(1 - number, asyncio.Event())
            event.set()
            await other.wait()  # never, if one ran after the other
            return [float(number)] * 3

        return judge

    total, parts = score([meets(0), sometimes(5, 5, 5), meets(1)], timeout=10)
    assert parts.tolist() == [[0, 5, 1]] * 3
    assert total.tolist() == [6] * 3


def test_they_run_where_a_loop_is_running_already():
    async def notebook():
        return score(AsyncJudge())[0].tolist()

    assert asyncio.run(notebook()) == [2, 3, 5]


def test_their_loop_lives_on_from_call_to_call():
    """Clients keep connections, which belong to a loop."""
    loops = []

    async def judge(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0, 0, 0]

    rewards = RewardFunctions(judge)
    for _ in range(2):
        rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert loops[0] is loops[1]
    assert loops[0].is_running()


def test_what_returns_an_awaitable_is_awaited():
    async def later():
        return [1, 2, 3]

    assert score(lambda **_: later())[0].tolist() == [1, 2, 3]


async def failing(completions):
    await asyncio.sleep(0)
    return {}["key"]


async def cancelled(completions):
    raise asyncio.CancelledError


async def nested(completions):
    return [[1], [2], [3]]


async def text(completions):
    return "good"


async def short(completions):
    return [1]


async def a_number_that_is_none(completions):
    return [1, math.nan, 2]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (failing, "reward function failing raised KeyError: 'key'"),
        (cancelled, "reward function cancelled raised CancelledError"),
        (nested, "reward function nested returned [1] (list) for row 0"),
        (text, "reward function text returned a str; expected a list of 3 numbers or None"),
        (short, "reward function short returned 1 rewards; expected a list of 3 numbers or None"),
        (a_number_that_is_none, "a_number_that_is_none returned nan for row 1; expected a finite number"),
    ],
)
def test_bad_asynchronous_rewards_are_refused(fn, message):
    assert message in refusal(fn)
    assert message in refusal([AsyncJudge(), fn, sometimes(1, 2, 3)])


def test_the_error_inside_is_chained():
    with pytest.raises(InputError) as caught:
        score(failing)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_elsewhere_leaves_nothing_unawaited():
    def broken(completions):
        raise ValueError("broken")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "reward function broken raised ValueError: broken" in refusal([AsyncJudge(), broken])
        gc.collect()
    assert not [str(warning.message) for warning in caught if "never awaited" in str(warning.message)]


def test_one_that_fails_ends_the_others():
    ended, finished = threading.Event(), []

    async def longer(completions):
        try:
            await asyncio.sleep(1)
            finished.append(True)
        finally:
            ended.set()

    assert "reward function failing raised KeyError" in refusal([longer, failing], timeout=None)
    assert ended.wait(30)
    assert not finished


def test_one_that_hangs_is_named():
    async def endless(completions):
        await asyncio.sleep(60)

    async def stubborn(completions):
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    for fn in (endless, stubborn):
        message = refusal([AsyncJudge(), fn], timeout=0.1)
        assert f"reward function {fn.__name__} has not returned after 0.1 seconds" in message


def test_one_that_blocks_the_loop_is_named_and_the_next_call_has_a_loop(monkeypatch):
    monkeypatch.setattr("lit_rlhf.rewards.calling._BLOCKED", 0.1)

    async def blocking(completions):
        time.sleep(8)

    message = refusal(blocking, timeout=0.1)
    assert "reward function blocking has not returned after 0.1 seconds" in message
    assert "it blocks its event loop instead of awaiting" in message
    assert score(AsyncJudge(), timeout=4)[0].tolist() == [2, 3, 5]


# before anything is sampled


def needy(completions, solution, **kwargs):
    raise AssertionError("it was called")


class Silent(GRPO):
    def sample(self, *arguments, **keywords):
        raise AssertionError("it sampled")


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_column_that_is_missing_is_told_before_the_model_samples(stage):
    rows = [{"prompt": "5 6", "answer": "7"}] * 4
    module = Silent(policy=tiny_model(), tokenizer=NumberTokenizer(), reward_funcs=[needy], prompts_per_rollout=4)
    run = getattr(trainer(max_epochs=1, limit_val_batches=1.0), stage)
    with pytest.raises(InputError, match=r"reward function needy needs 'solution', .*; it has answer, completion_ids"):
        run(module, datamodule=RowsDataModule(rows, rows))


def test_columns_that_are_there_and_what_is_told_are_no_problem():
    def fine(completions, answer, trainer_state, log_metric, log_extra, completion_ids, prompts, other=None):
        raise AssertionError("it was called")

    RewardFunctions(fine).check([{"prompt": "5", "answer": "6"}])
    RewardFunctions(needy).check([])
