"""Runs that are made to fail, each in one way, and sound ones: a tiny model whose completions end as an answer may."""

from dataclasses import replace

import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.stability_monitor import StabilityMonitor
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model, trainer

ENDS = [str(token) for token in range(2, 18)]  # a random model ends after four tokens, as an answer may
SAMPLING = SamplingConfig(max_new_tokens=24, stop=ENDS)
SIZES = {"group_size": 4, "prompts_per_rollout": 8, "sampling": SAMPLING, "minibatches": 2}
LR = 3e-3  # at which sound runs learn


def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def fives(completion_ids, **kwargs):
    """One answer alone is paid for."""
    return [float(ids[0] == 5) + 0.1 * (ids[0] % 2) for ids in completion_ids]


def long_is_good(completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]


def always_the_same(completion_ids, **kwargs):
    return [1.0 for _ in completion_ids]


def thousands(completion_ids, **kwargs):
    return [1000.0 * (ids[0] % 2) for ids in completion_ids]


class Changing:
    """Two rewards, the second from a rollout on: a verifier that is exchanged in the middle of a run."""

    __name__ = "changing"

    def __init__(self, first, second, rollouts):
        self.first, self.second, self.rollouts, self.calls = first, second, rollouts, 0

    def __call__(self, completion_ids, **kwargs):
        self.calls += 1
        return (self.first if self.calls <= self.rollouts else self.second)(completion_ids)


def odd(completion_ids, **kwargs):
    return [1 - reward for reward in even(completion_ids)]


class Noise:
    """A reward that has nothing to do with the completion."""

    __name__ = "noise"

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, completion_ids, **kwargs):
        return torch.rand(len(completion_ids), generator=self.generator).tolist()


class Shouting(PPO):
    """Its value function answers with the number of tokens so far, a hundredfold."""

    def score_rollout(self, rollout):
        rollout = super().score_rollout(rollout)
        return replace(rollout, values=rollout.response_mask.cumsum(1) * 100.0)


class Biased(PPO):
    """Its value function answers 5, whatever it is taught, where rewards are 0 or 1."""

    def score_rollout(self, rollout):
        rollout = super().score_rollout(rollout)
        return replace(rollout, values=torch.full_like(rollout.values, 5.0))


class FirstWeights(TransformersEngine):
    """An engine that never gets new weights."""

    exact_logprobs = False

    def update_weights(self, module, version):
        if not getattr(self, "pushed", False):
            self.frozen, self.pushed = tiny_model().double(), True
        super().update_weights(self.frozen, version)


class SometimesNan:
    """A loss that is NaN at the fifth of every eight calls."""

    __name__ = "sometimes_nan"

    def __init__(self):
        self.calls = 0

    def __call__(self, old_logp, logp, advantages, mask):
        self.calls += 1
        return -(logp - old_logp).exp() * advantages * (torch.nan if self.calls % 8 == 5 else 1.0), {}


def pairs(count, wrong=False, start=0):
    """The chosen completion ends in 3; where `wrong`, the rejected one does."""
    rows = [
        {"prompt": row["prompt"], "chosen": f"{20 + i % 9} 3", "rejected": f"{20 + i % 9} 4"}
        for i, row in enumerate(prompt_rows(start + count))
    ][start:]
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows] if wrong else rows


def demonstrations(count, seed):
    """Answers at random: there is nothing to learn but themselves."""
    drawn = torch.randint(20, 60, (count, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"prompt": "7 8", "completion": " ".join(map(str, ids))} for ids in drawn]


def findings_of(algorithm, arguments, rollouts, rows=None, held_out=None, **bounds):
    """What the monitor says of a run."""
    torch.set_num_threads(1)
    monitor = StabilityMonitor(bounds=bounds)
    own = SIZES if hasattr(algorithm, "collect") else {"batch_size": 8}
    module = build(algorithm, tiny_model(), **{**own, "seed": 7, "lr": LR, "reward_funcs": [even], **arguments})
    validated = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1} if held_out else {}
    fitter = trainer(epochs=rollouts, callbacks=[monitor], gradient_clip_val=1.0, **validated)
    data = RowsDataModule(rows or prompt_rows(32), held_out or ())
    if held_out:
        fitter.validate(module, datamodule=data, verbose=False)  # as `lit_rlhf.train` does
    fitter.fit(module, datamodule=data)
    return monitor.findings


ONCE = {"update_epochs": 1, "minibatches": 1, "kl_coef": 0.0}
FAILING = {  # what fails -> algorithm, arguments, rollouts or passes, other arguments of `findings_of`
    "learning rate": (GRPO, {"lr": 100 * LR}, 20, {}),
    "entropy": (GRPO, {"lr": 10 * LR, "reward_funcs": [fives], "minibatches": 1}, 30, {}),
    "pays for length": (DAPO, {"lr": 1e-2, "reward_funcs": [long_is_good], "max_rounds": 1}, 22, {}),
    "one reward for all": (GRPO, {"reward_funcs": [always_the_same]}, 20, {}),
    "the reward turns around": (GRPO, {"lr": 2 * LR, "reward_funcs": [Changing(even, odd, 15)]}, 30, {}),
    "rewards in thousands": (RLOO, {"reward_funcs": [thousands]}, 18, {}),
    "rewards grow to thousands": (RLOO, {"reward_funcs": [Changing(odd, thousands, 8)]}, 24, {}),
    "next to no clip range": (GRPO, {"clip_ratio_low": 1e-3, "clip_ratio_high": 1e-3, "minibatches": 8}, 20, {}),
    "cut off": (GRPO, {"sampling": SamplingConfig(max_new_tokens=3)}, 20, {}),
    "shouting value head": (Shouting, ONCE, 20, {}),
    "biased value head": (Biased, ONCE, 20, {}),
    "noise": (GRPO, {"reward_funcs": [Noise()], "lr": 1e-3}, 36, {"progress_rollouts": 30}),
    "old weights in the engine": (GRPO, {"engine": FirstWeights}, 18, {}),
    "not finite": (GRPO, {"policy_loss": SometimesNan()}, 6, {}),
    "stale": (ImportanceSampling, {"lr": 3 * LR, "buffer_size": 8}, 20, {}),
    "learnt by heart": (SFT, {}, 18, {"rows": demonstrations(16, 0), "held_out": demonstrations(16, 1)}),
    "learning rate of SFT": (SFT, {"lr": 1.0}, 4, {"rows": demonstrations(16, 0), "held_out": demonstrations(16, 1)}),
    "no preference": (DPO, {"lr": 1e-9}, 3, {"rows": pairs(16)}),
    "wrong way round": (DPO, {}, 4, {"rows": pairs(16), "held_out": pairs(16, wrong=True, start=16)}),
    "learning rate of DPO": (DPO, {"lr": 100 * LR}, 4, {"rows": pairs(16), "held_out": pairs(16, start=16)}),
}
