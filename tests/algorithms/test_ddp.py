"""Two ranks are one process with twice the rows: gradients, weights after a step, and every logged metric."""

import pytest
import torch
import torch.distributed as dist

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import (
    ONE_RANK_EMPTY,
    PROMPT_LENGTHS,
    UNEVEN,
    assert_same_run,
    on_given_rows,
    reported,
    run,
    run_of_four,
    start_of,
)
from tests.helpers import build, plain_logprobs, prompt_rows, random_experience, tiny_model


@pytest.mark.parametrize("lengths", [UNEVEN, ONE_RANK_EMPTY], ids=["uneven", "one rank empty"])
@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
def test_ranks_and_micro_batches_make_one_step(algorithm, loss_agg, lengths, tmp_path):
    terms = {"kl_coef": 0.3, "entropy_coef": 0.1}
    make = lambda: on_given_rows(algorithm)(tmp_path, lengths=lengths, loss_agg=loss_agg, **terms)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, devices=1)
    start = start_of(make())

    assert expected["metrics"]["stability/clip_fraction"] > 0
    assert expected["metrics"]["loss/loss"] != 0
    layouts = [(2, 1), (2, 2), (1, 4)] if loss_agg == "token-mean" else [(2, 2)]
    for devices, accumulate in layouts:
        found = run_of_four(make, tmp_path, devices, accumulate)
        assert_same_run(found, expected, start)

    # and the step is that of one batch: no trainer, no counts
    fresh = make()
    batch = fresh.collect(None)
    fresh.training_step(batch).backward()
    for name, p in fresh.models.policy.named_parameters():
        name = f"policy.{name}"
        torch.testing.assert_close(expected["weights"][name], p.detach() - 0.1 * p.grad, atol=1e-10, rtol=0)


def test_adamw_takes_the_same_step_on_two_ranks(tmp_path):
    make = lambda: on_given_rows(GRPO)(tmp_path, adamw=True, lr=1e-3, kl_coef=0.3)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, devices=1)
    found = run_of_four(make, tmp_path, devices=2, accumulate=2)
    assert_same_run(found, expected, start_of(make()), atol=1e-6)


@pytest.mark.parametrize(("devices", "accumulate"), [(2, 1), (2, 2)])
def test_demonstrations_on_two_ranks_make_the_same_steps(devices, accumulate, tmp_path):
    rows = [{**row, "completion": " ".join("7" * (1 + i % 5))} for i, row in enumerate(prompt_rows(17))]
    make = lambda: build(reported(SFT, tmp_path), batch_size=8)  # noqa: E731
    (expected,) = run(make, rows, tmp_path, devices=1)
    found = run(make, rows, tmp_path, devices, accumulate)
    assert [report["steps"] for report in (expected, *found)] == [2] * 3
    # the loss and the gradient's norm are means over steps, the lengths over rows: all are free of the layout
    assert_same_run(found, expected, start_of(make()))


def test_sampled_rollouts_do_not_depend_on_the_number_of_ranks(tmp_path):
    """Random numbers belong to the prompt: two ranks sample, and learn, what one process does."""
    arguments = {
        "group_size": 2,
        "prompts_per_rollout": 4,
        "sampling": SamplingConfig(max_new_tokens=4),
        "kl_coef": 0.1,
    }
    make = lambda: build(reported(GRPO, tmp_path), **arguments)  # noqa: E731
    (expected,) = run(make, prompt_rows(9), tmp_path, devices=1, epochs=2)
    found = run(make, prompt_rows(9), tmp_path, devices=2, epochs=2)
    for report in (expected, *found):
        assert report["loop"]["prompts_seen"] == 8
    # the sampler keeps its log-probs in float32, the policy here is float64
    assert_same_run(found, expected, start_of(make()), atol=1e-6)


def only_rank_0_tells_samples_apart(completion_ids, **kwargs):
    if dist.get_rank() == 1:
        return [1.0] * len(completion_ids)
    return [float(i % 2) for i in range(len(completion_ids))]


def neither_rank_does(completion_ids, **kwargs):
    return [1.0] * len(completion_ids)


@pytest.mark.parametrize(
    ("rewards", "filler"), [(only_rank_0_tells_samples_apart, 0.5), (neither_rank_does, 1.0)], ids=["one", "none"]
)
def test_dynamic_sampling_takes_the_same_rounds_on_ranks_that_fare_differently(rewards, filler, tmp_path):
    make = lambda: build(  # noqa: E731
        reported(DAPO, tmp_path),
        reward_funcs=[rewards],
        group_size=2,
        prompts_per_rollout=4,
        max_rounds=3,
        sampling=SamplingConfig(max_new_tokens=3),
    )
    first, second = run(make, prompt_rows(9), tmp_path, devices=2, epochs=3)

    assert first["steps"] == second["steps"] == 3
    for name, weight in first["weights"].items():
        assert (second["weights"][name] == weight).all(), name
        assert weight.isfinite().all()
    assert first["loop"]["prompts_seen"] == second["loop"]["prompts_seen"] == 3 * (4 + 2 * 4)
    assert first["loop"]["iteration"] == second["loop"]["iteration"] == 3
    assert first["metrics"]["rollout/dynamic_sampling_rounds"] == 3
    assert first["metrics"]["rollout/filler_fraction"] == filler
    assert second["loop"]["carried"] is None
    if filler == 0.5:
        assert first["metrics"]["rollout/staleness_max"] == 1
        carried = first["loop"]["carried"]
        assert len(carried["version"]) == 4
        assert (carried["version"] == 2).all()
        start = start_of(make())
        assert any((w != start[n]).any() for n, w in first["weights"].items())


def test_plain_log_probs_of_these_rows_lie_where_some_are_clipped():
    model = tiny_model().double()
    rows = random_experience(UNEVEN, PROMPT_LENGTHS, model=model)
    ratio = (plain_logprobs(model, rows) - rows.old_logprobs)[rows.response_mask].exp()
    assert ((ratio > 1.2) | (ratio < 0.8)).float().mean() > 0.2
