"""The thread that samples ahead: which weights it samples with, how it ends, and what becomes of its errors."""

import gc
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts import async_
from lit_rlhf.rollouts.async_ import AsyncSampler, Task
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import other_weights
from tests.helpers import EOS, PAD, tiny_model

PROMPTS, SEEDS = [[5, 6, 7], [8]], [11, 12]
SAMPLING = SamplingConfig(max_new_tokens=12, group_size=3)


def engine():
    return TransformersEngine([EOS], PAD)


def task(prompts=PROMPTS, sampling=SAMPLING):
    return Task(prompts, SEEDS[: len(prompts)], sampling)


def sampled(model, version=0):
    """The same samples without a thread."""
    plain = engine()
    plain.update_weights(model, version)
    return plain.generate(PROMPTS, SAMPLING, SEEDS)


def assert_same_rollout(found, expected):
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def running():
    """The samplers' threads."""
    return [thread for thread in threading.enumerate() if thread.name == "lit_rlhf.rollouts"]


class Gate:
    """An engine whose samples wait for a permission, and tell that they wait."""

    def __init__(self):
        self.inner, self.asked, self.open = engine(), threading.Semaphore(0), threading.Semaphore(0)

    def clone(self):
        return self

    def update_weights(self, module, version):
        self.inner.update_weights(module, version)

    def generate(self, *arguments):
        self.asked.release()
        self.open.acquire()
        return self.inner.generate(*arguments)


class Failing(TransformersEngine):
    """An engine that something goes wrong with, in its second rollout."""

    calls = 0

    def generate(self, prompt_ids, sampling, seed):
        self.calls += 1
        if self.calls == 2:
            raise InputError("the second rollout cannot be sampled")
        return super().generate(prompt_ids, sampling, seed)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not running()


# the weights


def with_lora():
    model = tiny_model()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
    return model


MODELS = {
    "llama": tiny_model,
    "gpt2": lambda: tiny_model("gpt2"),
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "lora": with_lora,
    "compiled": lambda: torch.compile(tiny_model(), backend="eager"),
}


def move(model, seed):
    """Another version of what is trained."""
    kept = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    other_weights(model, 0.1, seed)
    for name, p in model.named_parameters():
        if name in kept:
            p.data.copy_(kept[name])


@pytest.mark.parametrize("kind", MODELS)
def test_every_task_is_sampled_with_the_weights_of_its_submission(kind):
    """While the policy itself moves on; the second version finds the place of the first taken."""
    model, gate = MODELS[kind](), Gate()
    sampler, tasks, expected = AsyncSampler(gate, max_versions=2), [], []
    for version in range(5):
        expected.append(sampled(getattr(model, "_orig_mod", model), version))
        if version >= 2:
            gate.open.release()
            sampler.result(tasks[version - 2])
        tasks.append(task())
        sampler.submit(tasks[-1:], model, version)
        move(model, seed=version)
    gate.open.release(2)
    found = [sampler.result(one) for one in tasks]
    sampler.close()
    for one, other in zip(found, expected, strict=True):
        assert_same_rollout(one, other)
    ids = [tuple(rollout.response_ids.flatten().tolist()) for rollout in found]
    assert len(set(ids)) == 5, "the versions do not differ"


def test_copies_share_frozen_weights_and_no_others():
    model, gate = with_lora(), Gate()
    sampler, one = AsyncSampler(gate, max_versions=1), task()
    sampler.submit([one], model, 0)
    of_model = {p.data_ptr() for p in model.parameters()}
    shared = {name: p.data_ptr() in of_model for name, p in one.model.named_parameters()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert shared == {name: not trains for name, trains in trained.items()}
    assert any(trained.values())
    gate.open.release()
    sampler.result(one)
    assert one.model is None
    sampler.close()


def test_tasks_of_one_version_share_a_copy_and_versions_take_turns():
    model, gate = tiny_model(), Gate()
    sampler, tasks = AsyncSampler(gate, max_versions=2), [task() for _ in range(4)]
    sampler.submit(tasks[:2], model, 0)
    sampler.submit(tasks[2:3], model, 1)
    first, second = tasks[0].model, tasks[2].model
    assert tasks[1].model is first is not second
    gate.open.release(3)
    assert [int(sampler.result(one).version[0]) for one in tasks[:3]] == [0, 0, 1]
    sampler.submit(tasks[3:], model, 2)
    assert tasks[3].model is first
    gate.open.release()
    sampler.result(tasks[3])
    sampler.close()


def test_the_callers_autocast_is_the_threads():
    """It belongs to a thread, and would be off in a new one."""
    model, one = tiny_model(), task()
    sampler = AsyncSampler(engine(), max_versions=1)
    with torch.autocast("cpu", torch.bfloat16):
        expected = sampled(model)
        sampler.submit([one], model, 0)
    assert_same_rollout(sampler.result(one), expected)
    assert not torch.equal(expected.behavior_logprobs, sampled(model).behavior_logprobs)
    sampler.close()


def test_the_policy_itself_is_not_touched():
    model = tiny_model().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    sampler, one = AsyncSampler(engine(), max_versions=1), task()
    sampler.submit([one], model, 0)
    sampler.result(one)
    sampler.close()
    assert model.training
    assert not model._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


# errors


def check_until_it_fails(sampler, task):
    while True:
        sampler.check()


@pytest.mark.parametrize("ask", [check_until_it_fails, AsyncSampler.result])
def test_an_error_is_raised_as_it_is_where_somebody_asks(ask):
    sampler, tasks = AsyncSampler(Failing([EOS], PAD), max_versions=1), [task(), task()]
    sampler.submit(tasks, tiny_model(), 0)
    sampler.result(tasks[0])
    with pytest.raises(InputError, match=r"^the second rollout cannot be sampled$") as caught:
        ask(sampler, tasks[1])
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[0].startswith("test_")
    assert frames[-1] == "generate"
    assert not running()
    sampler.check()


def test_an_engine_that_cannot_be_cloned_is_refused():
    class Server:
        def generate(self, prompt_ids, sampling, seed): ...
        def update_weights(self, module, version): ...

    with pytest.raises(InputError, match=r"^rollout.max_staleness=3 samples in a thread .* Server has no clone\(\)"):
        AsyncSampler(Server(), max_versions=3)


# the end


def test_the_thread_ends_between_two_tokens_and_what_it_left_is_sampled_when_asked_for():
    """Closed in the middle of the first of two tasks."""
    model, seen, gate = tiny_model(), [], Gate()
    model.register_forward_pre_hook(lambda *_: seen.append(gate.asked.release()))  # the copy has it too
    sampler = AsyncSampler(engine(), max_versions=1)
    long = SamplingConfig(max_new_tokens=100, group_size=3)
    plain = TransformersEngine([], PAD)
    plain.update_weights(model, 0)
    expected = plain.generate(PROMPTS, long, SEEDS)
    tokens = len(seen)

    sampler.engine = plain
    tasks = [task(sampling=long), task(sampling=long)]
    for _ in range(tokens + 2):
        gate.asked.acquire(blocking=False)
    sampler.submit(tasks, model, 0)
    gate.asked.acquire()
    gate.asked.acquire()
    sampler.close()
    assert not running()
    assert tokens < len(seen) < 2 * tokens
    assert tasks[1].rollout is None

    other_weights(model, 0.1, seed=1)
    for one in tasks:
        assert_same_rollout(sampler.result(one), expected)
    sampler.close()


def test_what_is_finished_at_the_end_is_kept():
    model, gate = tiny_model(), Gate()
    sampler, tasks = AsyncSampler(gate, max_versions=1), [task(), task()]
    sampler.submit(tasks, model, 0)
    gate.open.release()
    gate.asked.acquire()
    gate.asked.acquire()  # the second one waits: the first is done
    gate.open.release()
    sampler.close()
    assert tasks[0].rollout is not None
    assert gate.asked.acquire(blocking=False) is False


def test_a_thread_that_hangs_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(async_, "_PATIENCE", 0.05)
    gate = Gate()
    sampler = AsyncSampler(gate, max_versions=1)
    sampler.submit([task()], tiny_model(), 0)
    gate.asked.acquire()
    sampler.close()
    (hanging,) = running()
    assert hanging.daemon
    gate.open.release()
    hanging.join()


def test_a_sampler_that_nobody_closes_ends_with_its_last_reference():
    sampler, one = AsyncSampler(engine(), max_versions=1), task()
    sampler.submit([one], tiny_model(), 0)
    sampler.result(one)
    assert running()
    del sampler
    gc.collect()
    assert not running()


EXITS = """
import sys
import torch
from lit_rlhf.rollouts.async_ import AsyncSampler, Task
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig
from tests.helpers import tiny_model

sampling = SamplingConfig(max_new_tokens=100_000, group_size=64)
sampler = AsyncSampler(TransformersEngine([], 0), 1)
sampler.submit([Task([[5, 6]], [1], sampling)], tiny_model(max_position_embeddings=200_000), 0)
print("the main thread is done")
"""


@pytest.mark.slow
def test_python_ends_while_the_thread_samples(tmp_path):
    """A daemon that torch's kernels are left in would abort the process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", EXITS], capture_output=True, timeout=100, env=environment, text=True)
    assert (ended.returncode, ended.stdout) == (0, "the main thread is done\n"), ended.stderr
