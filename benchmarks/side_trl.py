"""The workloads in TRL, by its own trainers.

Settings that differ from TRL's defaults: `gradient_checkpointing=False` and `bf16=False` (both are on by default and
slower here, or not the same arithmetic), one batch of all rows per optimiser step, a constant learning rate, no
reports. What is best stays as it is: its fused AdamW, the log-probs in tiles of the vocabulary ("fused LM head"), the
cache in generation, and no second forward pass for log-probs of its own samples (`steps_per_generation=1`).
"""

from __future__ import annotations

import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import TrainerCallback
from workers import Gate
from workloads import LEARNING_RATE, Workload, build_model, build_rows, build_tokenizer, reward_of


def build_trainer(work: Workload, folder: str | Path, reward: Any = None, model: Any = None, **config: Any) -> Any:
    """`GRPOTrainer`, `DPOTrainer` or `SFTTrainer` of the workload."""
    kind = work.algorithm.upper()
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": work.rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 10**6,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    models: dict[str, Any] = {"model": build_model(work) if model is None else model}
    if work.samples:
        settings |= {
            "num_generations": work.group_size,
            "max_completion_length": work.new_tokens,
            "steps_per_generation": 1,
            "num_iterations": 1,
            "loss_type": "grpo",
            "beta": 0.0,
        }
        models["reward_funcs"] = reward or constant
    if work.algorithm == "dpo":
        models["ref_model"] = build_model(work)
    return getattr(trl, f"{kind}Trainer")(
        args=getattr(trl, f"{kind}Config")(**{**settings, **config}),
        train_dataset=datasets.Dataset.from_list(build_rows(work)),
        processing_class=build_tokenizer(work),
        **models,
    )


def constant(completions: list[str], **_: Any) -> list[float]:
    """A reward where none matters."""
    return [0.0] * len(completions)


class Pace(TrainerCallback):
    """Stops at the gate before every optimiser step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins."""
        self.gate.boundary()


def train(work: Workload, connection: Connection) -> None:
    """Train for ever, from gate to gate."""
    gate = Gate(connection)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        gate.sampled += sum(len(ids) for ids in completion_ids)
        return [reward_of(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(work, folder, reward)
        trainer.add_callback(Pace(gate))
        count(trainer, gate, work)
        trainer.train()


def count(trainer: Any, gate: Gate, work: Workload) -> None:
    """Wrap the trainer's own methods: the time of its rollouts, and the tokens that are trained on."""
    if work.samples:
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            started = time.perf_counter()
            found = generate(inputs)
            gate.rollout_seconds += time.perf_counter() - started
            return found

        trainer._generate_and_score_completions = timed
    compute = trainer.compute_loss

    def counted(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        mask = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"][:, 1:] != -100
        gate.trained += int(mask.sum())
        return compute(model, inputs, *arguments, **named)

    trainer.compute_loss = counted


def gradient(trainer: Any, inputs: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of one batch, and the gradient by parameter."""
    trainer.current_gradient_accumulation_steps = 1  # what `train` would set
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}
