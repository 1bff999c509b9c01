"""One process, two ranks under DDP and two under FSDP2: the same weights, metrics and loop, for every algorithm.

DDP and FSDP2 add up the same numbers in the same order: without prompts that rows share (a sharded model shares none)
and without clipping (a norm is a sum over shards) their weights are the same to the last bit.
"""

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.models.forward import Shortcuts
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import assert_same_run, reported, run, start_of
from tests.helpers import build, prompt_rows, tiny_model

PASSES = {"batch_size": 8}
ROLLOUTS = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 1, "sampling": SamplingConfig(max_new_tokens=4)}
CRITIC = {"kl_coef": 0.1, "kl_in": "both", "update_epochs": 2}
RUNS = {
    "SFT": (SFT, PASSES),
    "DPO": (DPO, PASSES),
    "RewardModeling": (RewardModeling, {**PASSES, "center_coef": 0.01}),
    "PPO shared": (PPO, {**ROLLOUTS, **CRITIC, "value": "shared"}),
    "PPO separate": (PPO, {**ROLLOUTS, **CRITIC, "value": "separate"}),
    "GRPO": (GRPO, {**ROLLOUTS, "kl_coef": 0.1, "kl_estimator": "full", "update_epochs": 2}),
    "DAPO": (DAPO, ROLLOUTS),
    "GSPO": (GSPO, ROLLOUTS),
    "RLOO": (RLOO, {**ROLLOUTS, "kl_coef": 0.1}),
    "ImportanceSampling": (ImportanceSampling, {**ROLLOUTS, "buffer_size": 1}),
}


def completed(rows):
    """With demonstrations and pairs of different lengths."""
    long, short = (" ".join(str(20 + j) for j in range(4)), "7")
    return [
        {**row, "completion": (long, short)[i % 2], "chosen": long, "rejected": short} for i, row in enumerate(rows)
    ]


def number(completion_ids, **kwargs):
    """A reward that hardly two completions have."""
    return [sum(i * 64**-n for n, i in enumerate(ids)) for ids in completion_ids]


def module_of(algorithm, folder, model=None, **arguments):
    torch.manual_seed(3)  # a reward model's head is random
    module = build(reported(algorithm, folder, adamw=True), model, lr=1e-3, reward_funcs=[number], **arguments)
    module.models.shortcuts = Shortcuts(share_prompts=False)
    return module


def fit(name, folder, devices, strategy="ddp", model=tiny_model, of_trainer=None, **changes):
    algorithm, arguments = RUNS[name]
    make = lambda: module_of(algorithm, folder, model().double(), **{**arguments, **changes})  # noqa: E731
    return run(make, completed(prompt_rows(18)), folder, devices, epochs=2, strategy=strategy, **(of_trainer or {}))


def start(name, folder, model=tiny_model, **changes):
    algorithm, arguments = RUNS[name]
    return start_of(module_of(algorithm, folder, model().double(), **{**arguments, **changes}))


def assert_bit_equal(found, expected, rel=1e-12):
    """Weights; metrics are as close as norms of gradients are."""
    for rank in found:
        for name, weight in expected["weights"].items():
            assert torch.equal(rank["weights"][name], weight), name
        assert rank["metrics"] == pytest.approx(expected["metrics"], rel=rel)


@pytest.mark.parametrize("name", RUNS)
def test_one_process_ddp_and_fsdp2_make_the_same_run(name, tmp_path):
    (expected,) = fit(name, tmp_path, 1)
    ddp = fit(name, tmp_path, 2)
    assert_same_run(ddp, expected, start(name, tmp_path), atol=1e-6, metrics_atol=1e-5)
    assert_bit_equal(fit(name, tmp_path, 2, "fsdp2"), ddp[0])
