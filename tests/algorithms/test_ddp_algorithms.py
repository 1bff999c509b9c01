"""Two ranks are one process, for every on-policy algorithm and all that it keeps between rollouts."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import (
    ONE_RANK_EMPTY,
    assert_same_run,
    on_given_rows,
    reported,
    run,
    run_of_four,
    start_of,
)
from tests.helpers import build, plain_logprobs, prompt_rows, tiny_model

ADAPTS = {"kl_coef": 0.3, "kl_in": "reward", "kl_target": 0.05, "kl_horizon": 100}
PENALTY = {"conservative_coef": 1.0, "max_kl_divergence": 0.02, "adaptive": True}
RUNS = {
    "PPO": (PPO, {**ADAPTS, "entropy_coef": 0.1}),
    "PPO shared": (PPO, {**ADAPTS, "kl_in": "both", "value": "shared", "bootstrap_truncated": True}),
    "ConservativePPO": (ConservativePPO, {**PENALTY, "value": "shared"}),
    "ConservativePPO k2": (ConservativePPO, {**PENALTY, "penalty_kl": "k2"}),
    "GRPO batch": (GRPO, {"scale_rewards": "batch", "kl_coef": 0.3, "kl_estimator": "full"}),
    "DrGRPO": (DrGRPO, {}),
    "GSPO": (GSPO, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}),
    "GSPO-token": (GSPO, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "policy_loss": "gspo_token"}),
    "RLOO": (RLOO, ADAPTS),
    "RLOO clipped": (RLOO, {"policy_loss": "sequence_clip", "loss_agg": "seq-mean-token-mean"}),
    "REINFORCE": (REINFORCE, {**ADAPTS, "baseline_decay": 0.5}),
    "REINFORCE++": (REINFORCEPlusPlus, ADAPTS),
    "REINFORCE++ baseline": (REINFORCEPlusPlus, {"group_baseline": True, "kl_coef": 0.3}),
    "ReMax": (ReMax, {}),
    "CISPO": (CISPO, {"clip_max": 1.2}),
    "ImportanceSampling": (ImportanceSampling, {"kl_coef": 0.3}),
}
KEPT = {"PPO": "kl_coef", "ConservativePPO": "conservative_coef", "REINFORCE": "baseline_average"}


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_rollouts_and_steps_of_one_process(name, tmp_path):
    algorithm, arguments = RUNS[name]
    make = lambda: on_given_rows(algorithm)(tmp_path, **arguments)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, devices=1, epochs=2)
    found = run_of_four(make, tmp_path, devices=2, accumulate=2, epochs=2)
    assert_same_run(found, expected, start_of(make()))
    if name in KEPT:
        assert expected["loop"]["numbers"][KEPT[name]] not in (0.0, 0.3, 1.0)
    assert expected["metrics"]["stability/is_ratio_min"] < 1  # in the second rollout the rows are one rollout old


@pytest.mark.parametrize("name", ["PPO", "ConservativePPO", "GRPO batch", "REINFORCE", "REINFORCE++", "RLOO"])
def test_a_rank_without_a_single_token_takes_part(name, tmp_path):
    algorithm, arguments = RUNS[name]
    make = lambda: on_given_rows(algorithm)(tmp_path, lengths=ONE_RANK_EMPTY, **arguments)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, devices=1)
    assert_same_run(run_of_four(make, tmp_path, devices=2), expected, start_of(make()))


# target_kl: all ranks or none


def moved_apart(distance, rows_apart):
    """Old log-probs `distance` from the policy's on some rows and equal to it on the others."""

    def change(rows):
        now = plain_logprobs(tiny_model().double(), rows)
        signs = torch.where(torch.arange(now.shape[1]) % 2 == 0, 1.0, -1.0)
        apart = torch.tensor([i in rows_apart for i in range(len(rows))]).unsqueeze(1)
        return replace(rows, old_logprobs=torch.where(apart, now - distance * signs, now))

    return change


@pytest.mark.parametrize(
    ("distance", "target", "stops"),
    [(0.3, 0.01, True), (0.3, 0.02, False)],  # k3 is .045 on rank 1 alone: beyond, for either
    ids=["beyond on all", "beyond on one"],
)
@pytest.mark.parametrize("algorithm", [PPO, ConservativePPO])
def test_the_ranks_stop_together_and_by_the_mean_of_all(algorithm, distance, target, stops, tmp_path):
    arguments = {"target_kl": target, "update_epochs": 3, "kl_coef": 0, "value": "shared"}
    change = moved_apart(distance, rows_apart=(4, 5, 6, 7))
    make = lambda: on_given_rows(algorithm, change)(tmp_path, lengths=(5, 5, 5, 5, 3, 5, 4, 3), **arguments)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, devices=1)
    found = run_of_four(make, tmp_path, devices=2, accumulate=2)
    start = start_of(make())
    for report in (expected, *found):
        assert report["steps"] == 3
        assert ("stopped" in report["loop"]["numbers"]) or not stops
        unmoved = all(torch.equal(weight, start[name]) for name, weight in report["weights"].items())
        assert unmoved == stops
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(report["weights"][name], weight, atol=1e-10, rtol=0)
        for name, value in expected["metrics"].items():
            assert report["metrics"][name] == pytest.approx(value, abs=1e-8), name


# samples, and a buffer on every rank

SAMPLES = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4), "minibatches": 1}


@pytest.mark.parametrize("algorithm", [PPO, REINFORCE, ReMax])
def test_sampled_rollouts_do_not_depend_on_the_number_of_ranks(algorithm, tmp_path):
    make = lambda: build(reported(algorithm, tmp_path), **SAMPLES)  # noqa: E731
    (expected,) = run(make, prompt_rows(9), tmp_path, devices=1, epochs=2)
    found = run(make, prompt_rows(9), tmp_path, devices=2, epochs=2)
    # the sampler keeps its log-probs in float32, the policy here is float64
    for report in (expected, *found):
        report["loop"]["numbers"] = {k: round(v, 6) for k, v in report["loop"]["numbers"].items()}
    assert_same_run(found, expected, start_of(make()), atol=1e-6, metrics_atol=1e-5)


def test_every_rank_replays_its_own_rollouts(tmp_path):
    make = lambda: build(reported(ImportanceSampling, tmp_path), **SAMPLES, buffer_size=2)  # noqa: E731
    first, second = run(make, prompt_rows(9), tmp_path, devices=2, epochs=4)
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    buffers = [report["loop"]["replay"]["rollouts"] for report in (first, second)]
    assert [[len(rollout["version"]) for rollout in buffer] for buffer in buffers] == [[4, 4], [4, 4]]
    held = [{int(i) for rollout in buffer for i in rollout["group_ids"]} for buffer in buffers]
    assert held == [{8, 9, 12, 13}, {10, 11, 14, 15}]
    assert first["metrics"] == pytest.approx(second["metrics"])
    assert first["metrics"]["rollout/staleness_max"] == 1


def test_a_buffer_of_one_rollout_is_the_same_run_on_any_number_of_ranks(tmp_path):
    """Each rank draws all the groups that it holds."""
    make = lambda: build(reported(ImportanceSampling, tmp_path), **SAMPLES, buffer_size=1)  # noqa: E731
    (expected,) = run(make, prompt_rows(9), tmp_path, devices=1, epochs=2)
    found = run(make, prompt_rows(9), tmp_path, devices=2, epochs=2)
    assert_same_run(found, expected, start_of(make()), atol=1e-6, metrics_atol=1e-5)
