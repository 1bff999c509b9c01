"""The workloads in this library: the modules as users train them, by `lightning.Trainer`."""

from __future__ import annotations

import logging
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from workers import Gate
from workloads import LEARNING_RATE, Workload, build_model, build_rows, build_tokenizer, reward_of

from lit_rlhf import DPO, GRPO, PPO, SFT
from lit_rlhf.data import RowsDataModule
from lit_rlhf.types import Experience, PreferenceBatch, SamplingConfig


def build_module(work: Workload, **arguments: Any) -> Any:
    """The workload's algorithm with default settings, but for those that TRL is given, too."""
    common = {"policy": build_model(work), "tokenizer": build_tokenizer(work), "lr": LEARNING_RATE}
    if work.algorithm == "dpo":
        return DPO(batch_size=work.rows, **common, **arguments)
    if work.algorithm == "sft":
        return SFT(batch_size=work.rows, **common, **arguments)
    sizes = {"group_size": work.group_size, "prompts_per_rollout": work.rows // work.group_size}
    common |= {"sampling": SamplingConfig(work.new_tokens), **sizes}
    if work.algorithm == "ppo":
        return PPO(minibatches=2, **common, **arguments)
    return GRPO(**{**common, **arguments})


def build_trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    """A trainer that does what training needs, and nothing else."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 10**6, "gradient_clip_val": 1.0, **off}
    return Trainer(callbacks=list(callbacks), use_distributed_sampler=False, **{**settings, **arguments})


class Pace(Callback):
    """Stops at the gate before every epoch, which is a rollout or a pass, and counts."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """An epoch begins."""
        self.gate.boundary()

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Count the tokens that are trained on."""
        pair = isinstance(batch, PreferenceBatch)
        masks = (batch.chosen_mask, batch.rejected_mask) if pair else (batch.response_mask,)
        self.gate.trained += sum(int(mask.sum()) for mask in masks)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """The module has timed its rollout."""
        self.gate.rollout_seconds += getattr(module, "clock", {}).get("rollout", 0.0)


def train(work: Workload, connection: Connection) -> None:
    """Train for ever, from gate to gate."""
    gate = Gate(connection, steps=1 if work.samples else work.steps_per_pass)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        gate.sampled += sum(len(ids) for ids in completion_ids)
        return [reward_of(ids) for ids in completion_ids]

    module = build_module(work, reward_funcs=[reward]) if work.samples else build_module(work)
    build_trainer(Pace(gate)).fit(module, datamodule=RowsDataModule(build_rows(work)))


def experience(prompts: Tensor, responses: Tensor, mask: Tensor, old: Tensor, advantages: Tensor) -> Experience:
    """The rows as this library trains on them."""
    rows = len(prompts)
    return Experience(
        prompt_ids=prompts,
        prompt_mask=torch.ones_like(prompts, dtype=torch.bool),
        response_ids=responses,
        response_mask=mask,
        behavior_logprobs=old,
        truncated=torch.zeros(rows, dtype=torch.bool),
        group_ids=torch.unique(prompts, dim=0, return_inverse=True)[1],
        version=torch.zeros(rows, dtype=torch.long),
        raw_rewards=advantages,
        reward_parts=advantages.unsqueeze(1),
        rewards=advantages,
        old_logprobs=old,
        advantages=advantages.unsqueeze(1).expand_as(old),
    )


def gradient(module: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one batch, and the policy's gradient by parameter."""
    loss = module.training_step(batch)
    loss.backward()
    named = module.models.policy.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}
