"""What is healthy, which the report shades, and what is no longer sound, where the stability monitor speaks.

`BANDS` has the ranges that one wants to be in, `Healthy` the monitor's bounds, which are wider. They are those of the
usual advice (KL below 0.05, clip fraction below 0.3, advantages of standard deviation 1) where there is such, and
otherwise lie well outside of what sound runs of every algorithm show on the built-in task
(`benchmarks/monitor_quiet.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lit_rlhf.errors import InputError


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
    value_bias: float = 3.0  # of values against returns, in standard deviations of the returns
    progress_rollouts: int = 200  # after which the reward should have risen by more than it varies
    reward_drop: float = 0.5  # of what had been gained over the start, or of the start itself
    ess: float = 0.3
    mismatch_kl: float = 0.05  # nats per token between the sampler's log-probs and the trainer's
    grad_norm_growth: float = 50.0
    accuracy_solved: float = 0.9  # from here on it is success when nothing is left to learn from
    preference_accuracy: float = 0.55  # on training pairs; on held-out ones 1 minus this
    chosen_logps_growth: float = 2.0  # of a sum of negative numbers, over that of the first pass
    held_out_loss_growth: float = 1.05  # over its lowest, while the training loss falls
    held_out_accuracy_drop: float = 0.05  # from its highest, while that of training rises
    loss_growth: float = 1.1  # over what it began with, of training or held-out loss


BANDS: Mapping[str, tuple[float, float]] = {  # metric -> lowest and highest; its bound has the name after the slash
    "stability/approx_kl": (0.0, 0.05),
    "stability/clip_fraction": (0.0, 0.2),
    "stability/explained_variance": (0.5, 1.0),
    "stability/advantage_std": (0.1, 10.0),  # 1 where advantages are normalised
    "stability/ess": (0.5, 1.0),
    "reward/zero_std_fraction": (0.0, 0.8),
    "rollout/truncated_fraction": (0.0, 0.1),
}


def moved_bounds(healthy: Healthy) -> dict[str, Any]:
    """The bounds that are not those of `Healthy()`, by name."""
    usual = asdict(Healthy())
    return {name: bound for name, bound in asdict(healthy).items() if bound != usual[name]}


def bands(moved: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """`BANDS` of a run with these `moved_bounds`: the band of a metric whose bound was moved reaches to the bound."""
    usual, found = asdict(Healthy()), dict(BANDS)
    for metric, (low, high) in BANDS.items():
        name = metric.split("/")[1]
        if isinstance(bound := moved.get(name, usual[name]), Sequence):
            found[metric] = (bound[0], bound[1])
        elif name in moved:  # a bound below the band is a lower one
            found[metric] = (bound, high) if usual[name] < low else (low, bound)
    return found


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
