"""What goes wrong in training, how it shows in the metrics, and what to change: the stability monitor's gates."""

from __future__ import annotations

from dataclasses import dataclass

from lit_rlhf.monitoring import checks
from lit_rlhf.monitoring.checks import Check
from lit_rlhf.monitoring.healthy import Healthy
from lit_rlhf.monitoring.tracks import Tracks


@dataclass(frozen=True)
class Gate:
    """One way of going wrong.

    Args:
        name: of the finding.
        needs: metrics; where one is not logged, the gate is not there.
        check: what is wrong, in words and numbers; None where all is well.
        advice: what to change.
        looks_at: so many of the newest values decide, at once and from the first on; with 0 it is the median of ten,
            and it has to last.
        extreme: the same as `check`, of what is found at once, however short it lasts.
        whole_run: it is a matter of all rollouts so far, and not of the newest.
    """

    name: str
    needs: tuple[str, ...]
    check: Check
    advice: str
    looks_at: int = 0
    extreme: Check | None = None
    whole_run: bool = False

    def says(self, tracks: Tracks, healthy: Healthy) -> str | None:
        """What is wrong now; None where all is well, or there is too little to judge by."""
        found = [tracks[name] for name in self.needs if name in tracks]
        if len(found) < len(self.needs):
            return None
        ready = self.looks_at or all(track.full for track in found)
        return (self.check(tracks, healthy) if ready else None) or self.extreme_says(tracks, healthy)

    def extreme_says(self, tracks: Tracks, healthy: Healthy) -> str | None:
        """What is so wrong that nobody should wait."""
        known = self.extreme is not None and all(name in tracks for name in self.needs)
        return self.extreme(tracks, healthy) if self.extreme is not None and known else None

    def turned(self, tracks: Tracks, healthy: Healthy, wrong: bool) -> int:
        """How many rollouts ago, 0 for the newest, it began to be wrong, or to be well again.

        From then on three of four values are so, at least.
        """
        if self.looks_at:
            return self.looks_at - 1 if wrong else 0
        if self.whole_run:
            return max(tracks[name].count for name in self.needs) - 1 if wrong else 0
        places = range(-min(len(tracks[name].recent) for name in self.needs), 0)
        so = [(self._says_at(tracks, healthy, i) is not None) == wrong for i in places]
        return next((len(so) - i - 1 for i in range(len(so)) if so[i] and 4 * sum(so[i:]) >= 3 * (len(so) - i)), 0)

    def _says_at(self, tracks: Tracks, healthy: Healthy, i: int) -> str | None:
        then = {**tracks, **{name: tracks[name].at(i) for name in self.needs}}
        return self.check(then, healthy) or self.extreme_says(then, healthy)


_MOVES = "the policy moves {now} nats per token in an update, above {bound}"
_APART = "sampler and trainer are {now} nats per token apart, above {bound}"
GATES = (
    Gate(
        "nan",
        ("stability/skipped_fraction",),
        checks.skipped,
        "look at the rows in the run folder's nonfinite/; lower algo.lr; compute in bf16 or float32, not float16",
        looks_at=1,
    ),
    Gate(
        "kl",
        ("stability/approx_kl",),
        checks.above("stability/approx_kl", "approx_kl", _MOVES),
        "lower algo.lr or algo.update_epochs, add a KL penalty (algo.kl_coef), or stop early (algo.target_kl=0.03)",
        extreme=checks.far_above("stability/approx_kl", "approx_kl", _MOVES),
    ),
    Gate(
        "clipping",
        ("stability/clip_fraction",),
        checks.above("stability/clip_fraction", "clip_fraction", "the gradient of {now} of the tokens is clipped away"),
        "lower algo.lr, algo.minibatches or algo.update_epochs; a lower algo.clip_ratio_low would clip more",
    ),
    Gate(
        "ratio",
        ("stability/ratio_max",),
        checks.above("stability/ratio_max", "ratio_max", "a token's probability has grown {now}-fold within an update"),
        "lower algo.lr; sample with the weights that are trained (rollout.max_staleness=0)",
    ),
    Gate(
        "entropy collapse",
        ("stability/entropy",),
        checks.collapsed,
        "lower algo.lr, raise algo.clip_ratio_high (DAPO's 0.28), add algo.entropy_coef or algo.kl_coef",
    ),
    Gate(
        "entropy explosion",
        ("stability/entropy",),
        checks.scattered,
        "lower algo.lr; add algo.kl_coef; take algo.entropy_coef away",
    ),
    Gate(
        "reward lost",
        ("reward/reward_mean",),
        checks.reward_lost,
        "lower algo.lr or add algo.kl_coef, and go on from an earlier checkpoint (callbacks=best keeps it)",
    ),
    Gate(
        "no progress",
        ("reward/reward_mean",),
        checks.no_progress,
        "check the reward function by hand on a few samples: is it right, and does it tell good from bad? Then raise "
        "algo.lr, algo.group_size or algo.prompts_per_rollout",
        whole_run=True,
    ),
    Gate(
        "no signal",
        ("reward/zero_std_fraction",),
        checks.no_signal,
        "easier or mixed prompts (algo.curriculum=success_rate), a larger algo.group_size, a reward with more levels, "
        "or algo=dapo, which samples again",
    ),
    Gate(
        "truncation",
        ("rollout/truncated_fraction",),
        checks.above("rollout/truncated_fraction", "truncated_fraction", "{now} of the completions are cut off"),
        "raise rollout.max_new_tokens, penalise it (algo.truncation_penalty) or leave such completions out "
        "(algo.mask_truncated=true)",
    ),
    Gate(
        "length",
        ("rollout/response_length", "reward/length_correlation"),
        checks.paid_by_length,
        "look at the samples: the reward function may pay for length; penalise it, or take algo=dr_grpo, which "
        "does not divide by it",
    ),
    Gate(
        "advantages",
        ("stability/advantage_std",),
        checks.advantages,
        "scale the rewards to about 1, or normalise (algo.whiten_advantages=true)",
    ),
    Gate(
        "value function",
        tuple(f"stability/{name}" for name in ("explained_variance", "value_mean", "return_mean", "return_std")),
        checks.value_off,
        "another algo.value_lr or algo.value_coef, algo.value=separate, or an algorithm without one (algo=grpo)",
    ),
    Gate(
        "off-policy",
        ("stability/ess",),
        checks.stale,
        "lower rollout.max_staleness or algo.buffer_size, or algo.lr",
    ),
    Gate(
        "mismatch",
        ("stability/mismatch_kl",),
        checks.above("stability/mismatch_kl", "mismatch_kl", _APART),
        "give the engine the model's dtype (engine.dtype=float32), and look whether it has this run's weights",
        extreme=checks.far_above("stability/mismatch_kl", "mismatch_kl", _APART),
    ),
    Gate(
        "gradient",
        ("stability/grad_norm",),
        checks.gradient,
        "lower algo.lr, warm up (algo.warmup_steps), and look at the rewards' scale",
    ),
    Gate(
        "preferences",
        ("preference/preference_accuracy",),
        checks.no_preference,
        "raise algo.lr, and look whether chosen and rejected are the right way round, in training and held-out data",
        looks_at=2,
    ),
    Gate(
        "forgetting",
        ("preference/chosen_logps",),
        checks.forgotten,
        "lower algo.lr, raise algo.beta, or take algo=ipo, whose margin is bounded",
        looks_at=1,
    ),
    Gate(
        "overfit",
        (),
        checks.overfit,
        "fewer passes (trainer.max_epochs), more data or a lower algo.lr; callbacks=best keeps the best weights "
        "(callbacks.best.monitor=val/sft_loss callbacks.best.mode=min)",
        looks_at=2,
    ),
    Gate(
        "loss",
        ("loss/loss",),
        checks.diverged,
        "lower algo.lr, warm up (algo.warmup_steps), and look at rows of great loss",
        looks_at=1,
    ),
)
