"""Problems small enough to try every outcome: a bandit of three arms, and a language model of two steps."""

import itertools
import math
from dataclasses import replace

import torch
from torch.nn.functional import logsigmoid, pad

from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import ScoredRollout
from tests.helpers import mask_of


def rollout_of(rewards, lengths, group_ids=None, logprobs=None, width=None, **fields):
    """A scored rollout of which only what is given matters; rewards `[N]`."""
    N, width = len(rewards), width or max(lengths)
    zeros, rewards = torch.zeros(N, width, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    old = zeros if logprobs is None else logprobs.detach()
    given = {name: x if isinstance(x, torch.Tensor) else torch.tensor(x) for name, x in fields.items()}
    rows = {
        "prompt_ids": torch.ones(N, 1, dtype=torch.long),
        "prompt_mask": torch.ones(N, 1, dtype=torch.bool),
        "response_ids": torch.ones(N, width, dtype=torch.long),
        "response_mask": mask_of(lengths, width),
        "behavior_logprobs": old,
        "truncated": torch.zeros(N, dtype=torch.bool),
        "group_ids": torch.zeros(N, dtype=torch.long) if group_ids is None else torch.tensor(group_ids),
        "version": torch.zeros(N, dtype=torch.long),
        "raw_rewards": rewards,
        "reward_parts": rewards.unsqueeze(1),
        "rewards": rewards,
        "old_logprobs": old,
    }
    return ScoredRollout(**{**rows, **given})


def loss_of(module, rollout, logprobs, advantages=None, entropy=None, kl=None, values=None):
    """What the module makes of a rollout and the policy's scores now: its own rewards, advantages and loss."""
    module.loop.numbers.clear()
    experience = module.experience(rollout)
    if advantages is not None:
        experience = replace(experience, advantages=advantages)
    return sum(module.compute_loss(Scores(logprobs, entropy, kl, values), experience).values())


ARMS = [1.0, 0.0, 0.5]


def bandit_gradient(module, group_size, **fields):
    """E[-dL/dtheta] over every group of `group_size` arms of a uniform three-armed bandit."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    total = torch.zeros(3, dtype=torch.float64)
    for arms in itertools.product(range(3), repeat=group_size):
        logprobs = theta.log_softmax(0)[list(arms)].unsqueeze(1)
        given = {
            name: torch.full((group_size, 1) if name == "values" else (group_size,), x).double()
            for name, x in fields.items()
        }
        rollout = rollout_of([ARMS[arm] for arm in arms], [1] * group_size, logprobs=logprobs, **given)
        total -= torch.autograd.grad(loss_of(module, rollout, logprobs), theta)[0] / 3**group_size
    return total.tolist()


def bandit_by_hand(advantages_of, group_size):
    """The same of -mean_i A_i log p_i, with numbers alone: d log p_arm / d theta = onehot - 1/3."""
    total = [0.0] * 3
    for arms in itertools.product(range(3), repeat=group_size):
        for arm, A in zip(arms, advantages_of([ARMS[a] for a in arms]), strict=True):
            for k in range(3):
                total[k] += A * ((arm == k) - 1 / 3) / group_size / 3**group_size
    return total


THETA, BEHAVIOR, REFERENCE = ([0.4, -0.3], [-0.2, 0.5], [0.1, 0.1])  # the logit of "a" against EOS, at steps 1 and 2
TRAJECTORIES = [((0,), 0.2), ((1, 1), 1.0), ((1, 0), 0.0)]  # tokens (1 is "a", 0 is EOS) and reward
TRUE_GRADIENT = [0.054193, 0.146354]
KL_GRADIENT = [0.076840, -0.058542]  # of the whole sequence's KL to the reference


def toy_logprobs(theta, trajectory):
    """`[2]`, 0 where the trajectory has ended."""
    found = torch.stack([logsigmoid(theta[t] if a else -theta[t]) for t, a in enumerate(trajectory)])
    return pad(found, (0, 2 - len(found)))


def toy_kl(theta, reference):
    """`[2]`, the KL of each step's distribution."""
    p, q = theta.sigmoid(), reference.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def toy_gradient(module, rows=1, behavior=THETA, old=None, rewards=None, **fields):
    """E[-dL/dtheta] over every batch of `rows` trajectories that the behaviour policy samples.

    `old` are the logits of the policy at the start of the update, the behaviour's unless given.
    """
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    sampling, old, reference = (torch.tensor(x, dtype=torch.float64) for x in (behavior, old or behavior, REFERENCE))
    total = torch.zeros(2, dtype=torch.float64)
    for batch in itertools.product(TRAJECTORIES, repeat=rows):
        now, sampled, start, ref = (
            torch.stack([toy_logprobs(x, tokens) for tokens, _ in batch]) for x in (theta, sampling, old, reference)
        )
        rollout = rollout_of(
            [R if rewards is None else rewards for _, R in batch],
            [len(tokens) for tokens, _ in batch],
            logprobs=start,
            behavior_logprobs=sampled,
            ref_logprobs=ref,
            width=2,
            **{name: x(rows) for name, x in fields.items()},
        )
        kl = toy_kl(theta, reference).expand(rows, 2) if module.exact_kl else None
        loss = loss_of(module, rollout, now, kl=kl)
        total -= float(sampled.sum().exp()) * torch.autograd.grad(loss, theta)[0]
    return total.tolist()


def toy_by_hand(advantages_of, rows, share_of):
    """The same of -sum_it share_i A_it log p_it on the policy's own samples: d log p_t / d theta_t = a_t - sigmoid."""
    p = [1 / (1 + math.exp(-z)) for z in THETA]
    chance = {(0,): 1 - p[0], (1, 1): p[0] * p[1], (1, 0): p[0] * (1 - p[1])}
    total = [0.0, 0.0]
    for batch in itertools.product(TRAJECTORIES, repeat=rows):
        lengths = [len(tokens) for tokens, _ in batch]
        A = advantages_of([R for _, R in batch], lengths)
        for i, (tokens, _) in enumerate(batch):
            for t, a in enumerate(tokens):
                weight = math.prod(chance[tokens] for tokens, _ in batch) * share_of(lengths, i)
                total[t] += weight * A[i][t] * (a - p[t])
    return total
