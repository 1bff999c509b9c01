"""How what goes wrong shows in the metrics: each check says what is wrong, in words and numbers, or None."""

from __future__ import annotations

import operator
from collections.abc import Callable

from lit_rlhf.monitoring.healthy import Healthy
from lit_rlhf.monitoring.tracks import Tracks

Check = Callable[[Tracks, Healthy], str | None]
EXTREME = 10.0  # times a bound: not a matter of patience
_NATS = 5.0  # less than this is no forgetting, however likely the completion was


def above(metric: str, bound: str, text: str) -> Check:
    """Text with `{now}` and `{bound}` where the metric is above its bound."""
    return _compared(operator.gt, metric, bound, text)


def below(metric: str, bound: str, text: str) -> Check:
    """The same where the metric is below it."""
    return _compared(operator.lt, metric, bound, text)


def far_above(metric: str, bound: str, text: str) -> Check:
    """The same where any of its newest values is above `EXTREME` times the bound."""

    def check(tracks: Tracks, healthy: Healthy) -> str | None:
        worst, limit = max(tracks[metric].recent), getattr(healthy, bound)
        return text.format(now=f"{worst:.3g}", bound=f"{limit:.3g}") if worst > EXTREME * limit else None

    return check


def _compared(wrong: Callable[[float, float], bool], metric: str, bound: str, text: str) -> Check:
    def check(tracks: Tracks, healthy: Healthy) -> str | None:
        now, limit = tracks[metric].now, getattr(healthy, bound)
        return text.format(now=f"{now:.3g}", bound=f"{limit:.3g}") if wrong(now, limit) else None

    return check


def skipped(tracks: Tracks, healthy: Healthy) -> str | None:
    """Optimiser steps without a finite gradient."""
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
    return gained > 2 * reward.noise and reward.now - reward.start > healthy.accuracy_solved * gained


def no_signal(tracks: Tracks, healthy: Healthy) -> str | None:
    """Groups of equal rewards, where that is no success."""
    share = tracks["reward/zero_std_fraction"].now
    if share <= healthy.zero_std_fraction or _solved(tracks, healthy):
        return None
    return f"{share:.0%} of the completions are in groups of equal rewards, from which nothing is learnt"


def collapsed(tracks: Tracks, healthy: Healthy) -> str | None:
    """Next to no entropy left."""
    entropy = tracks["stability/entropy"]
    if entropy.now >= max(healthy.entropy_share * entropy.start, healthy.entropy):
        return None
    return f"the policy's entropy has fallen from {entropy.start:.3g} to {entropy.now:.3g} nats: it says one thing only"


def scattered(tracks: Tracks, healthy: Healthy) -> str | None:
    """Far more entropy than at the start."""
    entropy = tracks["stability/entropy"]
    if entropy.now <= healthy.entropy_growth * entropy.start:
        return None
    return f"the policy's entropy has risen from {entropy.start:.3g} to {entropy.now:.3g} nats: it falls apart"


def reward_lost(tracks: Tracks, healthy: Healthy) -> str | None:
    """Much of what had been gained is gone."""
    reward = tracks["reward/reward_mean"]
    best = max(reward.best, *reward.first)  # a run may break within its first rollouts
    scale = max(abs(best - reward.start), abs(best))
    if best - reward.now <= healthy.reward_drop * scale:
        return None
    return f"the mean reward was {best:.3g} and is {reward.now:.3g}"


def no_progress(tracks: Tracks, healthy: Healthy) -> str | None:
    """The reward has not risen by more than it varies."""
    reward = tracks["reward/reward_mean"]
    risen = reward.now - reward.start > 1.5 * reward.spread
    if reward.count < healthy.progress_rollouts or risen or _solved(tracks, healthy):
        return None
    return f"after {reward.count} rollouts the mean reward is {reward.now:.3g}, and it began with {reward.start:.3g}"


def paid_by_length(tracks: Tracks, healthy: Healthy) -> str | None:
    """Completions grow, and the longer ones have the reward."""
    length, tied = tracks["rollout/response_length"], tracks["reward/length_correlation"].now
    if tied < healthy.length_correlation or length.now < healthy.length_growth * length.start:
        return None
    grown = f"completions have grown from {length.start:.3g} to {length.now:.3g} tokens"
    return f"{grown} and the reward goes with the length (correlation {tied:.2f})"


def advantages(tracks: Tracks, healthy: Healthy) -> str | None:
    """Out of scale, but for none where all is solved, or all groups are of equal rewards, which `no_signal` tells."""
    std, (low, high) = tracks["stability/advantage_std"].now, healthy.advantage_std
    equal = tracks.get("reward/zero_std_fraction")
    explained = _solved(tracks, healthy) or (equal is not None and equal.now > healthy.zero_std_fraction)
    if low <= std <= high or (std < low and explained):
        return None
    return f"the advantages' standard deviation is {std:.3g}, outside of {low} to {high}"


def gradient(tracks: Tracks, healthy: Healthy) -> str | None:
    """A gradient that has grown out of all proportion."""
    norm = tracks["stability/grad_norm"]
    if norm.now <= healthy.grad_norm_growth * norm.start:
        return None
    return f"the gradient's norm has grown from {norm.start:.3g} to {norm.now:.3g}"


def value_off(tracks: Tracks, healthy: Healthy) -> str | None:
    """A value function that explains less than a constant would, or is far from the returns altogether."""
    share = tracks["stability/explained_variance"].now
    if share < healthy.explained_variance:
        return f"the value function explains {share:.3g} of the returns' variance: worse than a constant"
    value, returns = (tracks[f"stability/{name}_mean"] for name in ("value", "return"))
    apart, scale = abs(value.now - returns.now), tracks["stability/return_std"].now
    if apart <= healthy.value_bias * scale:
        return None
    return f"the value function says {value.now:.3g} on average, and the returns are {returns.now:.3g} +- {scale:.2g}"


def stale(tracks: Tracks, healthy: Healthy) -> str | None:
    """Importance weights of which few count, unless it is the engine that is wrong, which `mismatch` tells."""
    share, apart = tracks["stability/ess"].now, tracks.get("stability/mismatch_kl")
    if share >= healthy.ess or (apart is not None and apart.now > healthy.mismatch_kl):
        return None
    return f"only a share of {share:.3g} of the stale samples counts: the policy has moved on"


def forgotten(tracks: Tracks, healthy: Healthy) -> str | None:
    """Chosen completions that are far less likely than they were."""
    first, now = (tracks["preference/chosen_logps"].first[0], tracks["preference/chosen_logps"].recent[-1])
    if now >= min(healthy.chosen_logps_growth * first, first - _NATS):
        return None
    return f"the chosen completions' log-probability has fallen from {first:.3g} to {now:.3g}: they are being forgotten"


def no_preference(tracks: Tracks, healthy: Healthy) -> str | None:
    """Two passes no better than guessing, or held-out pairs that are the wrong way round."""
    share, held_out = tracks["preference/preference_accuracy"], tracks.get("val/preference_accuracy")
    low = healthy.preference_accuracy
    if share.count > 1 and max(list(share.recent)[-2:]) < low:
        return f"of the training pairs {share.recent[-1]:.3g} are in order: no better than guessing"
    if held_out is not None and held_out.count > 1 and held_out.recent[-1] < 1 - low:  # the first may be of the start
        return f"of the held-out pairs {held_out.recent[-1]:.3g} are in order: worse than guessing"
    return None


def overfit(tracks: Tracks, healthy: Healthy) -> str | None:
    """Two validations that are worse than one before, where training is better than any."""
    loss, training = (tracks.get(name) for name in ("val/sft_loss", "loss/loss"))
    if loss is not None and training is not None and len(loss.recent) > 2:
        *_, before, now = loss.recent
        worse = min(before, now) > healthy.held_out_loss_growth * loss.lowest
        if worse and training.recent[-1] < loss.lowest:
            figures = f"the held-out loss was {loss.lowest:.3g} and is {now:.3g}"
            return f"{figures}, that of training {training.recent[-1]:.3g}"
    held_out, share = (tracks.get(f"{of}/preference_accuracy") for of in ("val", "preference"))
    if held_out is not None and share is not None and len(held_out.recent) > 2:
        *_, before, now = held_out.recent
        worse = max(before, now) < held_out.highest - healthy.held_out_accuracy_drop
        if worse and share.recent[-1] > held_out.highest:
            figures = f"of the held-out pairs {held_out.highest:.3g} were in order and now {now:.3g}"
            return f"{figures}, of the training pairs {share.recent[-1]:.3g}"
    return None


def diverged(tracks: Tracks, healthy: Healthy) -> str | None:
    """A loss above what it began with, in training, or in training and on held-out rows."""
    if of_rollouts(tracks):
        return None  # a policy gradient's loss says nothing
    training, held_out = tracks["loss/loss"], tracks.get("val/sft_loss")
    now = training.recent[-1]
    if now > healthy.loss_growth * training.first[0] > 0:
        return f"the loss of training began with {training.first[0]:.3g} and is {now:.3g}"
    if held_out is not None and min(now, held_out.recent[-1]) > healthy.loss_growth * held_out.first[0]:
        return f"the held-out loss began with {held_out.first[0]:.3g} and is {held_out.recent[-1]:.3g}"
    return None


def of_rollouts(tracks: Tracks) -> bool:
    """Whether the run samples rollouts; else it makes passes over data."""
    return "stability/approx_kl" in tracks
