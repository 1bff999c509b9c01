"""The README's metrics table names what runs log, no more and no less."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from lit_rlhf import DAPO, DPO, GRPO, SFT, ConservativePPO, ReMax, RewardModeling
from lit_rlhf.data import ArithmeticData, RowsDataModule
from lit_rlhf.data.tasks import arithmetic_splits
from lit_rlhf.rewards import exact_match
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig

README = (Path(__file__).parents[1] / "README.md").read_text()


class OtherArithmetic(TransformersEngine):
    """As vLLM is: not exactly the policy."""

    exact_logprobs = False


class Names(DummyLogger):
    """Keeps the names of what is logged."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def log_metrics(self, metrics, step=None):
        self.names |= set(metrics)


def logged(module, **data):
    logger = Names()
    trainer = Trainer(
        max_epochs=1,
        max_steps=2,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=RowsDataModule(**data) if data else ArithmeticData(held_out=8, train_size=8))
    return logger.names


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def documented():
    names = set()
    for row in re.findall(r"^\| (`\w+/.*?) \|", README, flags=re.MULTILINE):
        base = None
        for name in re.findall(r"`([^`]+)`", row):
            if name.startswith("_"):  # `a/b_mean`, `_max` stands for a/b_max; `a/b`, `_max` for a/b_max
                known = re.sub(r"_(mean|greedy)$", "", base)
                names.add(known + name)
            else:
                base = name
                names.add(name)
    return names


@pytest.mark.slow
def test_the_metrics_table_is_what_runs_log():
    sampling = SamplingConfig(max_new_tokens=8)
    sampled = {"validation_samples": 4, "sampling": sampling}
    small = {"prompts_per_rollout": 4, "group_size": 2, "kl_coef": 0.1, "entropy_coef": 0.01, "sampling": sampling}
    others = GRPO(**small, engine=OtherArithmetic)
    stale = {"importance_correction": "token", "target_kl": 1.0}
    found = logged(DAPO(**small, **stale)) | logged(GRPO(**small)) | logged(SFT(batch_size=4, **sampled))
    found |= logged(ConservativePPO(**small)) | logged(ReMax(**small)) | logged(others)
    found |= logged(GRPO(**{**small, "sampling": SamplingConfig(max_new_tokens=8, max_staleness=1)}))
    curriculum = {"curriculum": "success_rate", "curriculum_level": "difficulty", "reward_funcs": [exact_match]}
    found |= logged(GRPO(**small, **curriculum), train_rows=arithmetic_splits([2], train_size=8)[0])
    found |= logged(DPO(batch_size=4, sampling=sampling)) | logged(RewardModeling(batch_size=4, center_coef=0.01))
    shown = [{"prompt": "1+2=", "completion": "3"}] * 4
    found |= logged(SFT(batch_size=4), train_rows=shown, held_out_rows=shown)
    rows = [{"prompt": "1+2=" + "0" * zeros} for zeros in (0, 0, 0, 0, 200)]
    found |= logged(GRPO(**small, reward_funcs=[length]), train_rows=rows, held_out_rows=rows, long_rows="drop")
    assert documented() == {re.sub(r"rewards/(exact_match|length)", "rewards/NAME", name) for name in found}
