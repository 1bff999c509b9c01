"""Whether both libraries compute the same loss and gradient of the same rows with the same weights."""

from __future__ import annotations

import tempfile
from typing import Any

import side_ours
import side_trl
import torch
from torch import Tensor
from workloads import Workload, build_rows, sampled_rows

GROUPS = 2  # of sampled rows in the comparison


def compare(work: Workload) -> tuple[float, float]:
    """Relative differences of the loss, and of the gradient of the parameter that differs most."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = side_trl.build_trainer(work, folder)
        module = side_ours.build_module(work, **({"reward_funcs": [side_trl.constant]} if work.samples else {}))
        if work.samples:
            rows = sampled_rows(work, GROUPS)
            mine, theirs = side_ours.experience(**rows), trl_inputs(**rows)
        else:
            given, dataset = build_rows(work)[: work.rows], trainer.train_dataset
            mine = module.collate(given)
            theirs = trainer.data_collator([dataset[i] for i in range(work.rows)])
        loss, gradients = side_ours.gradient(module, mine)
        expected, expected_gradients = side_trl.gradient(trainer, theirs)
    if gradients.keys() != expected_gradients.keys():
        raise SystemExit(f"{work.name}: other parameters have a gradient")
    errors = [float((gradients[n] - g).norm() / g.norm()) for n, g in expected_gradients.items()]
    return abs(loss - expected) / abs(expected), max(errors)


def trl_inputs(prompts: Tensor, responses: Tensor, mask: Tensor, old: Tensor, advantages: Tensor) -> dict[str, Any]:
    """The rows as TRL's `compute_loss` takes them."""
    return {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": responses,
        "completion_mask": mask.long(),
        "old_per_token_logps": old,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
