"""Whether both libraries compute the same loss and gradient of the same rows with the same weights."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import side_ours
import side_trl
import torch
from torch import Tensor
from workloads import EOS, Workload, build_model, build_rows

from lit_rlhf.types import Experience

GROUPS = 2  # of sampled rows in the comparison


def compare(work: Workload) -> tuple[float, float]:
    """Relative differences of the loss, and of the gradient of the parameter that differs most."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = side_trl.build_trainer(work, folder)
        module = side_ours.build_module(work, **({"reward_funcs": [side_trl.constant]} if work.samples else {}))
        if work.samples:
            rows = sampled_rows(work)
            mine, theirs = experience(**rows), trl_inputs(**rows)
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


def sampled_rows(work: Workload, groups: int = GROUPS) -> dict[str, Tensor]:
    """Random completions of some prompts, with old log-probs near the model's own, on both sides of the clip range.

    `prompts` `[N, P]`, `responses` and `mask` `[N, T]`, `old` `[N, T]`, `advantages` `[N]`.
    """
    generator, lengths = torch.Generator().manual_seed(0), random.Random(0)
    rows = groups * work.group_size
    prompts = torch.randint(EOS + 1, work.vocabulary, (groups, work.prompt_length), generator=generator)
    prompts = prompts.repeat_interleave(work.group_size, 0)
    responses = torch.randint(EOS + 1, work.vocabulary, (rows, work.new_tokens), generator=generator)
    drawn = [min(work.new_tokens, 1 + int(lengths.expovariate(1 / (work.mean_length or 1e9)))) for _ in range(rows)]
    mask = torch.arange(work.new_tokens) < torch.tensor(drawn).unsqueeze(1)
    with torch.no_grad():
        logits = build_model(work)(torch.cat([prompts, responses], 1), logits_to_keep=work.new_tokens + 1).logits
        logps = logits[:, :-1].log_softmax(-1).gather(2, responses.unsqueeze(2)).squeeze(2)
    old = logps + 0.2 * torch.randn(logps.shape, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    return {"prompts": prompts, "responses": responses, "mask": mask, "old": old, "advantages": advantages}


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
