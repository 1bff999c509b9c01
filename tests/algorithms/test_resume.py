"""A run that was killed and continued ends with the very weights of one that was not."""

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, assert_same, checkpointed, everything, fit_of, loop_in, tensors_of

ROLLOUTS, STEPS = 3, 4  # optimiser steps per rollout: 2 passes of 2 minibatches
ON_POLICY = {
    "group_size": 2,
    "prompts_per_rollout": 8,
    "minibatches": 2,
    "update_epochs": 2,
    "sampling": SamplingConfig(max_new_tokens=4),
}
SETTINGS = {
    "grpo": (GRPO, {**ON_POLICY, "kl_coef": 0.1}),  # with a reference, which must come back too
    "dapo": (DAPO, {**ON_POLICY, "max_rounds": 3}),
    "sft": (SFT, {"batch_size": 8}),
}


def fit(name, accumulate=1, change=(), **arguments):
    algorithm, own = SETTINGS[name]
    return fit_of(algorithm, {**own, **dict(change)}, ROLLOUTS, accumulate, **arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per setting, which saves after every step and after every rollout, and how it ended."""
    known = {}

    def run(name, accumulate):
        if (name, accumulate) not in known:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(f"{name}{accumulate}")
            steps = checkpointed(folder / "steps", every_n_train_steps=1)
            rollouts = checkpointed(folder / "rollouts", every_n_epochs=1)
            ended = fit(name, accumulate, callbacks=[steps, rollouts])
            assert ended[1].global_step == ROLLOUTS * STEPS
            known[name, accumulate] = folder, everything(*ended)
        return known[name, accumulate]

    return run


WITHIN = [f"steps/epoch=1-step={STEPS + 1}.ckpt", f"steps/epoch=1-step={STEPS + 2}.ckpt"]
BETWEEN = [f"steps/epoch=1-step={2 * STEPS}.ckpt", f"rollouts/epoch=1-step={2 * STEPS}.ckpt"]


@pytest.mark.parametrize("checkpoint", [*WITHIN, *BETWEEN])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(uninterrupted, name, accumulate, checkpoint):
    folder, expected = uninterrupted(name, accumulate)
    resumed = fit(name, accumulate, seed=1, ckpt_path=folder / checkpoint)
    assert_same(everything(*resumed), expected)


def test_the_runs_compared_do_depend_on_where_they_begin(uninterrupted):
    """Otherwise equal weights at the end would prove nothing."""
    _, expected = uninterrupted("dapo", 1)
    other = everything(*fit("dapo", seed=1))
    assert not any(torch.equal(other["weights"][name], w) for name, w in expected["weights"].items() if w.ndim > 1)


def test_two_ranks_resume_each_with_their_own_rollout(tmp_path):
    whole, _ = fit("dapo", devices=2, callbacks=[checkpointed(tmp_path, every_n_train_steps=1)])
    within = tmp_path / f"epoch=1-step={STEPS + 1}.ckpt"
    first, second = (rank["loop"]["experience"] for rank in torch.load(within, weights_only=True)["lit_rlhf"]["ranks"])
    assert not torch.equal(first["group_ids"], second["group_ids"])
    resumed, _ = fit("dapo", devices=2, seed=1, ckpt_path=within)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_checkpoint_holds_tensors_and_plain_containers_and_nothing_that_runs(uninterrupted, name):
    folder, _ = uninterrupted(name, 1)
    plain = (torch.Tensor, int, float, bool, str, type(None))
    for file in folder.rglob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        odd = {path: type(v) for path, v in tensors_of(checkpoint).items() if not isinstance(v, (*plain, dict, list))}
        assert not odd


def test_a_checkpoint_within_a_rollout_holds_the_rollout_and_one_between_does_not(uninterrupted):
    folder, _ = uninterrupted("dapo", 1)
    loops = {f: loop_in(folder / f) for f in [*WITHIN, *BETWEEN]}
    assert [(loop["iteration"], loop["position"]) for loop in loops.values()] == [(1, 1), (1, 2), (2, 0), (2, 0)]
    assert [loop["experience"] is None for loop in loops.values()] == [False, False, True, True]
    assert all(loop["carried"] is not None for loop in loops.values()), "no group was carried over"


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("extra", [1, 3])
def test_a_checkpoint_within_an_optimiser_step_goes_back_to_its_beginning(uninterrupted, tmp_path, name, extra):
    _, expected = uninterrupted(name, 2)
    path = tmp_path / "odd.ckpt"
    fit(name, 2, callbacks=[SaveAt(2 * STEPS + extra, path)])
    loop = loop_in(path)
    assert loop["position"] == extra, "the checkpoint is not from within a step"
    assert_same(everything(*fit(name, 2, seed=1, ckpt_path=path)), expected)


def test_the_metrics_of_a_rollout_survive_a_stop_in_its_middle(uninterrupted, tmp_path):
    class Published(SaveAt):
        def on_train_epoch_start(self, trainer, module):
            self.rows = getattr(self, "rows", [])
            publish = module.publish
            module.publish = lambda stats, extra=None: (
                self.rows.append({k: float(v) for k, v in stats.compute().items()}) or publish(stats, extra)
            )

    whole, rest = Published(0, None), Published(0, None)
    folder, _ = uninterrupted("grpo", 1)
    fit("grpo", 1, callbacks=[whole])
    fit("grpo", 1, seed=1, callbacks=[rest], ckpt_path=folder / WITHIN[1])
    assert "reward/reward_mean" in rest.rows[0]
    assert rest.rows[0] in whole.rows
