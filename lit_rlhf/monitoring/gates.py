"""What goes wrong in training, how it shows in the metrics, and what to change: the stability monitor's gates.

The bounds are those of the usual advice (KL below 0.05, clip fraction below 0.3, advantages of standard deviation 1)
where there is such, and otherwise lie well outside of what sound runs of every algorithm show on the built-in task.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from statistics import median, stdev
from typing import Any

from lit_rlhf.errors import InputError

FIRST, RECENT = 5, 10  # rollouts that a run is measured by: those that it begins with, and the newest


@dataclass
class Track:
    """One metric over the run, as far as gates look at it."""

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    best: float = -float("inf")  # highest median of `recent`
    count: int = 0  # rollouts so far

    def add(self, value: float) -> None:
        """Take the value of another rollout."""
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(value)
        self.recent.append(value)
        if len(self.recent) == RECENT:
            self.best = max(self.best, self.now)

    @property
    def now(self) -> float:
        """Median of the newest values: one rollout does not make a finding."""
        return median(self.recent)

    @property
    def start(self) -> float:
        """Median of the first values."""
        return median(self.first)

    @property
    def full(self) -> bool:
        """Whether there is enough to judge by."""
        return len(self.recent) == RECENT


@dataclass(frozen=True)
class Healthy:
    """The bounds; an algorithm whose paper says otherwise has its own (`RLHFModule.healthy`)."""

    approx_kl: float = 0.05  # nats per token between the policy that sampled and the one in training
    clip_fraction: float = 0.3
    ratio_max: float = 100.0  # of policy / old policy on any one token
    advantage_std: tuple[float, float] = (0.1, 10.0)
    entropy: float = 0.01  # nats
    entropy_share: float = 0.03  # of the first rollouts' entropy
    entropy_growth: float = 2.0  # over the first rollouts' entropy
    zero_std_fraction: float = 0.9
    truncated_fraction: float = 0.5
    length_growth: float = 1.5  # over the first rollouts' length, where rewards go with it
    length_correlation: float = 0.6
    explained_variance: float = -0.5
    progress_rollouts: int = 200  # after which the reward should have risen by more than it varies
    reward_drop: float = 0.5  # of what had been gained over the start, or of the start itself
    ess: float = 0.3
    mismatch_kl: float = 0.05  # nats per token between the sampler's log-probs and the trainer's
    grad_norm_growth: float = 50.0
    accuracy_solved: float = 0.9  # from here on it is success when nothing is left to learn from
    preference_accuracy: float = 0.55


Tracks = Mapping[str, Track]
Check = Callable[[Tracks, Healthy], str | None]


@dataclass(frozen=True)
class Gate:
    """One way of going wrong.

    Args:
        name: of the finding.
        needs: metrics; where one is not logged, the gate is not there.
        check: what is wrong, in words and numbers; None where all is well.
        advice: what to change.
        at_once: look at the newest value alone, from the first rollout on.
    """

    name: str
    needs: tuple[str, ...]
    check: Check
    advice: str
    at_once: bool = False


def above(metric: str, bound: str, text: str) -> Check:
    """Text with `{now}` and `{bound}` where the metric is above its bound."""
    return _compared(operator.gt, metric, bound, text)


def below(metric: str, bound: str, text: str) -> Check:
    """The same where the metric is below it."""
    return _compared(operator.lt, metric, bound, text)


def _compared(wrong: Callable[[float, float], bool], metric: str, bound: str, text: str) -> Check:
    def check(tracks: Tracks, healthy: Healthy) -> str | None:
        now, limit = tracks[metric].now, getattr(healthy, bound)
        return text.format(now=f"{now:.3g}", bound=f"{limit:.3g}") if wrong(now, limit) else None

    return check


def _skipped(tracks: Tracks, healthy: Healthy) -> str | None:
    share = tracks["stability/skipped_fraction"].recent[-1]
    return f"{share:.0%} of the optimiser steps had a gradient that is not finite and were left out" if share else None


def _solved(tracks: Tracks, healthy: Healthy) -> bool:
    """Whether having nothing to learn from is success: right nearly always, or at the top of what it has risen to."""
    if "reward/accuracy" in tracks:
        return tracks["reward/accuracy"].now > healthy.accuracy_solved
    reward = tracks.get("reward/reward_mean")
    if reward is None or not reward.full:
        return False
    gained = reward.best - reward.start
    return gained > 2 * stdev(reward.first) and reward.now - reward.start > healthy.accuracy_solved * gained


def _no_signal(tracks: Tracks, healthy: Healthy) -> str | None:
    share = tracks["reward/zero_std_fraction"].now
    if share <= healthy.zero_std_fraction or _solved(tracks, healthy):
        return None
    return f"{share:.0%} of the completions are in groups of equal rewards, from which nothing is learnt"


def _collapsed(tracks: Tracks, healthy: Healthy) -> str | None:
    entropy = tracks["stability/entropy"]
    if entropy.now >= max(healthy.entropy_share * entropy.start, healthy.entropy):
        return None
    return f"the policy's entropy has fallen from {entropy.start:.3g} to {entropy.now:.3g} nats: it says one thing only"


def _scattered(tracks: Tracks, healthy: Healthy) -> str | None:
    entropy = tracks["stability/entropy"]
    if entropy.now <= healthy.entropy_growth * entropy.start:
        return None
    return f"the policy's entropy has risen from {entropy.start:.3g} to {entropy.now:.3g} nats: it falls apart"


def _reward_lost(tracks: Tracks, healthy: Healthy) -> str | None:
    reward = tracks["reward/reward_mean"]
    best = max(reward.best, *reward.first)  # a run may break within its first rollouts
    scale = max(abs(best - reward.start), abs(best))
    if best - reward.now <= healthy.reward_drop * scale:
        return None
    return f"the mean reward was {best:.3g} and is {reward.now:.3g}"


def _no_progress(tracks: Tracks, healthy: Healthy) -> str | None:
    reward = tracks["reward/reward_mean"]
    spread = stdev(reward.recent)
    if reward.count < healthy.progress_rollouts or reward.now - reward.start > spread or _solved(tracks, healthy):
        return None
    return f"after {reward.count} rollouts the mean reward is {reward.now:.3g}, and it began with {reward.start:.3g}"


def _paid_by_length(tracks: Tracks, healthy: Healthy) -> str | None:
    length, tied = tracks["rollout/response_length"], tracks["reward/length_correlation"].now
    if tied < healthy.length_correlation or length.now < healthy.length_growth * length.start:
        return None
    grown = f"completions have grown from {length.start:.3g} to {length.now:.3g} tokens"
    return f"{grown} and the reward goes with the length (correlation {tied:.2f})"


def _advantages(tracks: Tracks, healthy: Healthy) -> str | None:
    std, (low, high) = tracks["stability/advantage_std"].now, healthy.advantage_std
    if low <= std <= high or (std < low and _solved(tracks, healthy)):
        return None
    return f"the advantages' standard deviation is {std:.3g}, outside of {low} to {high}"


def _gradient(tracks: Tracks, healthy: Healthy) -> str | None:
    norm = tracks["stability/grad_norm"]
    if norm.now <= healthy.grad_norm_growth * norm.start:
        return None
    return f"the gradient's norm has grown from {norm.start:.3g} to {norm.now:.3g}"


GATES = (
    Gate(
        "nan",
        ("stability/skipped_fraction",),
        _skipped,
        "look at the rows in the run folder's nonfinite/; lower algo.lr; compute in bf16 or float32, not float16",
        at_once=True,
    ),
    Gate(
        "kl",
        ("stability/approx_kl",),
        above("stability/approx_kl", "approx_kl", "the policy moves {now} nats per token in an update, above {bound}"),
        "lower algo.lr or algo.update_epochs, add a KL penalty (algo.kl_coef), or stop early (algo.target_kl=0.03)",
    ),
    Gate(
        "clipping",
        ("stability/clip_fraction",),
        above("stability/clip_fraction", "clip_fraction", "the gradient of {now} of the tokens is clipped away"),
        "lower algo.lr, algo.minibatches or algo.update_epochs; a lower algo.clip_ratio_low would clip more",
    ),
    Gate(
        "ratio",
        ("stability/ratio_max",),
        above("stability/ratio_max", "ratio_max", "a token's probability has grown {now}-fold within an update"),
        "lower algo.lr; sample with the weights that are trained (rollout.max_staleness=0)",
    ),
    Gate(
        "entropy collapse",
        ("stability/entropy",),
        _collapsed,
        "lower algo.lr, raise algo.clip_ratio_high (DAPO's 0.28), add algo.entropy_coef or algo.kl_coef",
    ),
    Gate(
        "entropy explosion",
        ("stability/entropy",),
        _scattered,
        "lower algo.lr; add algo.kl_coef; take algo.entropy_coef away",
    ),
    Gate(
        "reward lost",
        ("reward/reward_mean",),
        _reward_lost,
        "lower algo.lr or add algo.kl_coef, and go on from an earlier checkpoint (callbacks=best keeps it)",
    ),
    Gate(
        "no progress",
        ("reward/reward_mean",),
        _no_progress,
        "check the reward function by hand on a few samples: is it right, and does it tell good from bad? Then raise "
        "algo.lr, algo.group_size or algo.prompts_per_rollout",
    ),
    Gate(
        "no signal",
        ("reward/zero_std_fraction",),
        _no_signal,
        "easier or mixed prompts (algo.curriculum=success_rate), a larger algo.group_size, a reward with more levels, "
        "or algo=dapo, which samples again",
    ),
    Gate(
        "truncation",
        ("rollout/truncated_fraction",),
        above("rollout/truncated_fraction", "truncated_fraction", "{now} of the completions are cut off"),
        "raise rollout.max_new_tokens, penalise it (algo.truncation_penalty) or leave such completions out "
        "(algo.mask_truncated=true)",
    ),
    Gate(
        "length",
        ("rollout/response_length", "reward/length_correlation"),
        _paid_by_length,
        "look at the samples: the reward function may pay for length; penalise it, or take algo=dr_grpo, which "
        "does not divide by it",
    ),
    Gate(
        "advantages",
        ("stability/advantage_std",),
        _advantages,
        "scale the rewards to about 1, or normalise (algo.whiten_advantages=true)",
    ),
    Gate(
        "value function",
        ("stability/explained_variance",),
        below(
            "stability/explained_variance",
            "explained_variance",
            "the value function explains {now} of the returns' variance: worse than a constant",
        ),
        "another algo.value_lr or algo.value_coef, algo.value=separate, or an algorithm without one (algo=grpo)",
    ),
    Gate(
        "off-policy",
        ("stability/ess",),
        below("stability/ess", "ess", "of the stale samples only a share of {now} counts: the policy has moved on"),
        "lower rollout.max_staleness or algo.buffer_size, or algo.lr",
    ),
    Gate(
        "mismatch",
        ("stability/mismatch_kl",),
        above(
            "stability/mismatch_kl", "mismatch_kl", "sampler and trainer are {now} nats per token apart, above {bound}"
        ),
        "give the engine the model's dtype (engine.dtype=float32), and look whether it has this run's weights",
    ),
    Gate(
        "gradient",
        ("stability/grad_norm",),
        _gradient,
        "lower algo.lr, warm up (algo.warmup_steps), and look at the rewards' scale",
    ),
    Gate(
        "preferences",
        ("preference/preference_accuracy",),
        below(
            "preference/preference_accuracy",
            "preference_accuracy",
            "of the training pairs {now} are in order: no better than guessing",
        ),
        "raise algo.lr, and look whether chosen and rejected are the right way round",
    ),
)


def checked_bounds(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds by the names of `Healthy`.

    Raises:
        InputError: there is no such bound, or it is no number.
    """
    known = {f.name: f.default for f in fields(Healthy)}
    for name, value in bounds.items():
        if name not in known:
            raise InputError(f"callbacks.monitor.bounds.{name}: there is no such bound; known: {', '.join(known)}")
        numbers, wanted = ([*x] if isinstance(x, (list, tuple)) else [x] for x in (value, known[name]))
        if len(numbers) != len(wanted) or not all(type(x) in (int, float) for x in numbers):
            raise InputError(f"callbacks.monitor.bounds.{name} must be like {known[name]}, got {value!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in bounds.items()}


def plain(tracks: Tracks) -> dict[str, Any]:
    """For a checkpoint."""
    return {name: [list(t.first), list(t.recent), t.best, t.count] for name, t in tracks.items()}


def tracks_from(saved: Mapping[str, Any]) -> dict[str, Track]:
    """The inverse of `plain`."""
    return {name: Track(list(a), deque(b, maxlen=RECENT), best, n) for name, (a, b, best, n) in saved.items()}
