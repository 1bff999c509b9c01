"""Runs whose rollouts are sampled ahead: by which weights, corrected how, resumed, on two ranks, and how they end."""

import copy
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import verifier
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.rollouts.random import mix_seed
from lit_rlhf.rollouts.sampler import TRAINING
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import assert_same_run, reported, run, start_of
from tests.algorithms.resuming import SaveAt, assert_same, everything, first_is_even, fit_of, loop_in
from tests.helpers import EOS, PAD, build, plain_logprobs, prompt_rows, trainer
from tests.runs import QUIET, new_process

ROLLOUTS, ACCUMULATE = 5, 2
SIZES = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 1, "update_epochs": 2}


def ahead(k, **arguments):
    return {**SIZES, "sampling": SamplingConfig(max_new_tokens=4, max_staleness=k), **arguments}


def running():
    return [thread for thread in threading.enumerate() if thread.name == "lit_rlhf.rollouts"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not running()


@verifier
def is_even(completion_ids, **kwargs):
    return first_is_even(completion_ids)


# which weights


class Watched(Callback):
    """The policy and the rollout that every update phase begins with, and what is logged of it."""

    def __init__(self):
        self.policies, self.rollouts, self.logged = [], [], []

    def on_train_epoch_start(self, trainer, module):
        publish = module.publish

        def keep(stats, extra=None):
            self.logged.append({k: float(v) for k, v in stats.compute().items()} | dict(extra or {}))
            module.publish = publish
            publish(stats, extra)

        module.publish = keep

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.policies.append(copy.deepcopy(module.models.policy))
            self.rollouts.append(module.loop.experience)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_rollout_j_is_sampled_by_the_weights_of_j_minus_k(k):
    """Token by token what an engine of its own samples from the policies that were there."""
    watched = Watched()
    module, _ = fit_of(GRPO, ahead(k, minibatches=2), ROLLOUTS, callbacks=[watched])
    engine = TransformersEngine([EOS], PAD)
    for j, rollout in enumerate(watched.rollouts):
        version, prompts = max(0, j - k), module.prompts.take(4 * j, 4)
        engine.update_weights(watched.policies[version], version)
        seeds = [mix_seed(module.seed, TRAINING, i) for i in prompts.index]
        expected = engine.generate(prompts.prompt_ids, module.sampling, seeds)
        for name in ("prompt_ids", "response_ids", "response_mask", "behavior_logprobs", "version"):
            assert torch.equal(getattr(rollout, name), getattr(expected, name)), name
        assert (rollout.version == version).all()
        assert rollout.raw_rewards.tolist() == first_is_even(rollout.response_ids.tolist())
        assert watched.logged[j]["rollout/staleness"] == watched.logged[j]["rollout/staleness_max"] == j - version
    assert len({float(policy.lm_head.weight.detach().sum()) for policy in watched.policies}) == ROLLOUTS
    assert module.loop.ahead == []
    assert module.loop.prompts_seen == 4 * ROLLOUTS, "rollouts were drawn that nobody trains on"


@pytest.mark.parametrize("k", [1, 2])
def test_stale_rows_are_scored_again_and_corrected(k):
    """Without a word from the user: pi_old is the policy that the updates begin with, and weights are not all one."""
    watched = Watched()
    module, _ = fit_of(GRPO, ahead(k), ROLLOUTS, callbacks=[watched])
    for j, (policy, rollout) in enumerate(zip(watched.policies, watched.rollouts, strict=True)):
        mask = rollout.response_mask
        now = plain_logprobs(policy.double(), rollout)
        torch.testing.assert_close(rollout.old_logprobs[mask].double(), now[mask], atol=1e-5, rtol=0)
        weights, _ = module.importance(rollout.old_logprobs, rollout)
        raw = (now - rollout.behavior_logprobs)[mask].exp().clamp(0.5, 2)
        decay = module.importance.staleness_decay ** min(j, k)
        torch.testing.assert_close(
            weights[mask].double(), raw * decay if j else torch.ones_like(raw), atol=1e-4, rtol=0
        )
        assert ("stability/is_ratio_mean" in watched.logged[j]) == (j > 0)
        assert bool((raw - 1).abs().max() > 1e-3) == (j > 0)


def test_what_goes_on_while_a_rollout_is_sampled_does_not_change_it():
    """Validation and a user's own samples have an engine of their own."""

    class Interferes(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.sample(module.prompts.take(100, 3), SamplingConfig(max_new_tokens=7))

    ended = [everything(*fit_of(GRPO, ahead(1), 3, callbacks=c)) for c in ([], [Interferes()])]
    assert_same(*ended)


@pytest.mark.parametrize("k", [1, 2])
def test_a_curriculum_counts_for_the_rows_that_were_drawn(k):
    """Whose draw is k rollouts back, when other rows stood at these positions of the stream."""
    rows, counted = prompt_rows(30), []

    class Counted(GRPO):
        def sample_recorded(self, prompts):
            sampled = super().sample_recorded(prompts)
            for i, row in enumerate(prompts.rows):
                ids = sampled.prompt_ids[self.group_size * i][sampled.prompt_mask[self.group_size * i]]
                assert " ".join(map(str, ids.tolist())) == rows[row]["prompt"] == prompts.columns["prompt"][i]
            counted.append((self.loop.iteration, prompts.rows))
            return sampled

    curriculum = {"curriculum": "success_rate", "curriculum_decay": 1.0, "reward_funcs": [is_even]}
    module, _ = fit_of(Counted, ahead(k, **curriculum), ROLLOUTS, rows=rows)
    assert [iteration for iteration, _ in counted] == list(range(ROLLOUTS))
    drawn = torch.tensor([row for _, rows in counted for row in rows])
    assert module.loop.curriculum.rows.tries.tolist() == (2 * torch.bincount(drawn, minlength=30)).tolist()


# resumed

SETTINGS = {
    "GRPO": (GRPO, {"kl_coef": 0.1}),
    "DAPO": (DAPO, {"max_rounds": 3}),
    "PPO": (PPO, {"value": "shared", "group_size": 1}),
    "PPO stopped": (PPO, {"value": "shared", "target_kl": 1e-6}),
    "ReMax": (ReMax, {"group_size": 1}),
    "REINFORCE": (REINFORCE, {"group_size": 1, "update_epochs": 2, "importance_correction": "token"}),
    "ImportanceSampling": (ImportanceSampling, {"buffer_size": 2}),
    "GRPO with a curriculum": (GRPO, {"curriculum": "success_rate", "reward_funcs": [is_even]}),
    "DAPO with a curriculum": (DAPO, {"curriculum": "success_rate", "reward_funcs": [is_even], "max_rounds": 3}),
}
# of four micro-batches each: the first rollout's first, one within the second, within one of its steps, and its last
STOPS = (1, 6, 7, 8)


def fit(name, k, rollouts=ROLLOUTS, change=(), **arguments):
    algorithm, own = SETTINGS[name]
    return fit_of(
        algorithm, {**ahead(k, **own), **dict(change)}, rollouts, ACCUMULATE, rows=prompt_rows(30), **arguments
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per setting that saves at every stop, and how it ended."""
    known = {}

    def ended(name, k):
        if (name, k) not in known:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("run")
            saving = [SaveAt(at, folder / str(at)) for at in STOPS]
            known[name, k] = folder, everything(*fit(name, k, callbacks=saving))
        return known[name, k]

    return ended


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("k", [1, 2])
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(uninterrupted, name, k, stop):
    folder, expected = uninterrupted(name, k)
    assert [a["iteration"] for a in loop_in(folder / str(stop))["ahead"]] == [stop // 5 + i for i in range(1, k + 1)]
    assert_same(everything(*fit(name, k, seed=1, ckpt_path=folder / str(stop))), expected)


def test_what_was_sampled_ahead_decides_how_a_resumed_run_goes_on(uninterrupted, tmp_path):
    """Otherwise equal weights would not prove that it came back."""
    folder, expected = uninterrupted("GRPO", 1)
    checkpoint = torch.load(folder / "6", weights_only=True)
    checkpoint["lit_rlhf"]["ranks"][0]["loop"]["ahead"] = []
    torch.save(checkpoint, tmp_path / "without.ckpt")
    module, _ = fit("GRPO", 1, ckpt_path=tmp_path / "without.ckpt")
    assert not torch.equal(module.models.policy.lm_head.weight, expected["weights"]["models.policy.lm_head.weight"])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 0), (1, 2)])
def test_a_run_can_go_on_with_another_staleness(uninterrupted, before, after):
    folder, _ = uninterrupted("GRPO", before)
    watched = Watched()
    fit("GRPO", after, ckpt_path=folder / "6", callbacks=[watched])
    ages = [int(rollout.staleness.max()) for rollout in watched.rollouts]
    assert ages == {(2, 1): [2, 2, 1], (1, 0): [1, 0, 0], (1, 2): [1, 1, 2]}[before, after]


def test_what_was_not_finished_when_a_run_ended_is_in_a_checkpoint_of_after_it(tmp_path):
    """A run that its user stops, saved afterwards, goes on as if nothing had happened."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 4

    expected = everything(*fit("GRPO", 2))
    module, stopped = fit("GRPO", 2, callbacks=[Stops()])
    assert module.loop.iteration == 2
    assert len(module.loop.ahead) == 2
    stopped.save_checkpoint(tmp_path / "after.ckpt")
    assert not running()
    assert_same(everything(*fit("GRPO", 2, seed=1, ckpt_path=tmp_path / "after.ckpt")), expected)


# ranks


def test_rollouts_sampled_ahead_do_not_depend_on_the_number_of_ranks(tmp_path):
    arguments = {**ahead(2), "kl_coef": 0.1}
    make = lambda: build(reported(GRPO, tmp_path), **arguments)  # noqa: E731
    (expected,) = run(make, prompt_rows(9), tmp_path, devices=1, epochs=4)
    found = run(make, prompt_rows(9), tmp_path, devices=2, epochs=4)
    for report in (expected, *found):
        assert report["metrics"]["rollout/staleness"] == 2
    # the sampler keeps its log-probs in float32, the policy here is float64
    assert_same_run(found, expected, start_of(make()), atol=1e-6, metrics_atol=1e-6)


def test_two_ranks_resume_each_with_what_it_had_sampled_ahead(tmp_path):
    path = tmp_path / "within.ckpt"
    whole, _ = fit("DAPO with a curriculum", 1, devices=2, callbacks=[SaveAt(6, path)])
    first, second = (loop_in(path, rank)["ahead"][0] for rank in (0, 1))
    assert not set(first["index"]) & set(second["index"])
    resumed, _ = fit("DAPO with a curriculum", 1, devices=2, seed=1, ckpt_path=path)
    assert_same(resumed.state_dict(), whole.state_dict())


# how it ends


class Fails(TransformersEngine):
    """An engine whose clone cannot sample what was submitted second."""

    calls = 0

    def generate(self, prompt_ids, sampling, seed):
        self.calls += 1
        if self.calls == 2 and threading.current_thread() is not threading.main_thread():
            raise InputError("rollout 2 cannot be sampled")
        return super().generate(prompt_ids, sampling, seed)


class Waits(Callback):
    """Gives the sampler's thread time to fail, before the second rollout's first micro-batch; counts them."""

    batches = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches += 1
        if self.batches == 5:
            for thread in running():
                thread.join(10)


def test_an_error_of_the_thread_ends_the_run_at_the_next_micro_batch():
    waits = Waits()
    with pytest.raises(InputError, match=r"^rollout 2 cannot be sampled$"):
        fit("GRPO", 1, callbacks=[waits], change={"engine": Fails([EOS], PAD)})
    assert waits.batches == 5
    assert not running()


class Broken(TransformersEngine):
    """An engine that samples in the main thread only."""

    def generate(self, prompt_ids, sampling, seed):
        if threading.current_thread() is not threading.main_thread():
            raise InputError("engine: this one samples in the main thread only")
        return super().generate(prompt_ids, sampling, seed)


@pytest.mark.slow
def test_on_the_command_line_it_is_one_sentence(tmp_path):
    engine = "engine._target_=tests.algorithms.test_async.Broken"
    arguments = [
        "debug=tiny",
        "algo=grpo",
        "rollout.max_staleness=1",
        "validate_first=false",
        "trainer.max_epochs=2",
        engine,
    ]
    ended = new_process(*arguments, *QUIET, cwd=tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    assert ended.sentence() == "engine: this one samples in the main thread only"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_where_training_breaks_off(error):
    class Breaks(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 3:
                assert running()
                raise error

    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit("GRPO", 2, callbacks=[Breaks()])
    assert not running()


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_time": {"microseconds": 1}}])
def test_the_thread_ends_with_every_limit_of_a_run(limit):
    module = build(GRPO, **ahead(2))
    fitter = trainer(accumulate=2, epochs=-1, **limit)
    for _ in range(2):
        fitter.fit(module, datamodule=RowsDataModule(prompt_rows(9)))
        assert not running()
    if "max_steps" in limit:
        assert module.loop.ahead == []


def test_fits_one_after_the_other_are_one_long_run():
    """A second fit takes up what the first had sampled ahead, unless the first had known its end."""
    module = build(GRPO, **ahead(1))
    for _ in range(2):
        trainer(accumulate=2, epochs=2).fit(module, datamodule=RowsDataModule(prompt_rows(9)))
    assert module.loop.iteration == 4
    assert module.loop.prompts_seen == 16


# what cannot be


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_a_sharded_policy_is_refused(strategy):
    module = build(GRPO, **ahead(1))
    module._trainer = SimpleNamespace(strategy=object.__new__(strategy))  # of which only the kind is looked at
    with pytest.raises(
        InputError, match=rf"rollout.max_staleness=1 .* with {strategy.__name__} no device has all of it"
    ):
        module.ahead.prepare(module)


def test_nothing_is_sampled_ahead_of_given_completions():
    with pytest.warns(UserWarning, match="rollout.max_staleness has no effect: SFT trains on completions"):
        build(SFT, sampling=SamplingConfig(max_staleness=1))


def test_a_negative_staleness_is_refused():
    with pytest.raises(InputError, match=r"max_staleness must be 0 \(synchronous\) or more, got -1"):
        SamplingConfig(max_staleness=-1)


# old log-probs that the update finds by itself

ONE_STEP = {"update_epochs": 1, "minibatches": 1, "group_size": 2, "lr": 1e-2}


def estimator_of_its_own(rewards, mask, old_logprobs):
    assert (old_logprobs[mask] < 0).all()
    return rewards - rewards.mean(), None


class Collecting(GRPO):
    """Looks at what is collected."""

    def collect(self, prompts):
        found = super().collect(prompts)
        assert found.old_logprobs.isfinite().all()
        return found


class Shaped(GRPO):
    def shape_rewards(self, rollout):
        return super().shape_rewards(rollout) + 0.1 * rollout.old_logprobs.where(rollout.response_mask, 0.0).sum(1)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "found"),
    [
        (GRPO, {}, True),
        (GRPO, {"kl_coef": 0.1, "kl_in": "loss"}, True),
        (DAPO, {"max_rounds": 3}, True),
        (ImportanceSampling, {"buffer_size": 2}, True),
        (GRPO, {"sampling": SamplingConfig(max_new_tokens=4, top_p=0.9)}, True),
        (GRPO, {"importance_correction": "none"}, False),
        (GRPO, {"kl_coef": 0.1, "kl_in": "reward"}, False),
        (GRPO, {"minibatches": 2}, False),
        (GRPO, {"update_epochs": 2}, False),
        (GRPO, {"advantage_estimator": estimator_of_its_own}, False),
        (Shaped, {}, False),
        (Collecting, {}, False),
    ],
)
def test_one_step_finds_the_old_log_probs_that_scoring_them_again_would(algorithm, arguments, found, monkeypatch):
    """The same run with and without the forward pass that is saved."""

    def ended():
        watched = Watched()
        settings = ahead(1, **{**ONE_STEP, **arguments})
        module, _ = fit_of(algorithm, settings, 3, ACCUMULATE, callbacks=[watched], rows=prompt_rows(30))
        marked = [rollout.unscored is not None and bool(rollout.unscored.any()) for rollout in watched.rollouts]
        return module.state_dict(), watched.logged, marked

    weights, logged, marked = ended()
    monkeypatch.setattr("lit_rlhf.algorithms.on_policy.is_found_in_update", lambda module: False)
    expected, expected_logged, never = ended()
    assert any(marked) == found
    assert not any(never)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-5, rtol=0)
    for one, other in zip(logged, expected_logged, strict=True):
        assert {k: v for k, v in one.items() if k[:4] != "perf"} == pytest.approx(
            {k: v for k, v in other.items() if k[:4] != "perf"}, abs=2e-4
        )
