"""Where the training loop stands: held by the module, saved in its checkpoint, so that a killed run resumes exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.ahead import Ahead
from lit_rlhf.rollouts.curriculum import CurriculumState
from lit_rlhf.rollouts.replay import ReplayBuffer
from lit_rlhf.types import Experience, Rollout, ScoredRollout


@dataclass
class LoopState:
    """Position in the endless sequence of rollouts (on-policy) or passes over the data (SFT, preferences).

    It is plain data: randomness is counter-based from (seed, position), so no generator state is needed.
    """

    iteration: int = 0  # rollouts, or passes over the data, completed
    position: int = 0  # micro-batches already taken from this one
    prompts_seen: int = 0  # prompts drawn from the stream so far, over all ranks
    experience: Experience | None = None  # the rollout being trained on
    carried: ScoredRollout | None = None  # surplus groups of dynamic sampling, for the next rollout
    replay: ReplayBuffer | None = None  # past rollouts, of the algorithms that train on them again
    curriculum: CurriculumState | None = None  # what the curriculum knows of the prompts
    ahead: list[Ahead] = field(default_factory=list)  # the next rollouts, sampled before their turn
    numbers: dict[str, float] = field(default_factory=dict)  # baselines, adaptive coefficients: what else moves

    def finish_iteration(self) -> None:
        """Move on to the next rollout or pass."""
        self.iteration, self.position, self.experience = self.iteration + 1, 0, None

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain containers only, as checkpoints hold them."""
        return {f.name: _to_plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_plain(cls, plain: Any) -> LoopState:
        """The inverse of `to_plain`.

        Raises:
            InputError: it is not.
        """
        try:
            return cls._from_plain(plain)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"ckpt_path: where the run stands cannot be read ({type(error).__name__}: {error}); it is broken or of "
                "another version: give another checkpoint, or begin anew from the exported model"
            ) from error

    @classmethod
    def _from_plain(cls, plain: Any) -> LoopState:
        state = cls(**{**plain, "experience": None, "carried": None, "replay": None, "curriculum": None, "ahead": []})
        if plain["experience"] is not None:
            state.experience = Experience(**plain["experience"])
        if plain["carried"] is not None:
            state.carried = ScoredRollout(**plain["carried"])
        if plain["replay"] is not None:
            state.replay = ReplayBuffer.from_plain(plain["replay"])
        if plain.get("curriculum") is not None:
            state.curriculum = CurriculumState.from_plain(plain["curriculum"])
        state.ahead = [Ahead.from_plain(ahead) for ahead in plain.get("ahead", [])]
        return state


def _to_plain(value: Any) -> Any:
    if isinstance(value, (ReplayBuffer, CurriculumState, Ahead)):
        return value.to_plain()
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, Rollout):
        plain: dict[str, Tensor | None] = {f.name: getattr(value, f.name) for f in fields(value)}
        return plain
    return value


def check_resumable(saved: Mapping[str, Any] | None, algorithm: str, shape: Mapping[str, Any], ranks: int) -> None:
    """Refuse to continue from a checkpoint whose loop cannot go on here.

    Args:
        saved: what the module left in the checkpoint; None if it left nothing.
        algorithm: the class's name now.
        shape: the settings, by their key on the command line, that the position in the loop depends on.
        ranks: processes now.

    Raises:
        InputError: another library's checkpoint, another algorithm, other settings, another number of processes.
    """
    if saved is None:
        raise InputError("ckpt_path: not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/")
    states = saved.get("ranks", [None])
    if not {"algorithm", "shape"} <= saved.keys() or not all(isinstance(own, Mapping) for own in states):
        raise InputError("ckpt_path: no whole checkpoint, where the run stands is not in it; give another")
    if saved["algorithm"] != algorithm:
        raise InputError(
            f"ckpt_path: a checkpoint of {saved['algorithm']} cannot continue as {algorithm}; "
            f"choose the same algorithm, or load its exported model/ with model.path"
        )
    if len(saved["ranks"]) != ranks:
        raise InputError(
            f"ckpt_path: saved by {len(saved['ranks'])} processes, now there are {ranks}; "
            f"resume with the same number of devices"
        )
    changed = [f"{k}={saved['shape'].get(k)} (now {v})" for k, v in shape.items() if saved["shape"].get(k) != v]
    if changed:
        raise InputError(f"ckpt_path: the run was made with {', '.join(changed)}; resume with the same")


def check_same_model(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture, or that are no numbers.

    Raises:
        InputError: a weight is missing, too many, of another shape or not finite.
    """
    other = sorted(saved.keys() ^ now.keys()) or sorted(k for k in now if saved[k].shape != now[k].shape)
    if other:
        raise InputError(
            f"ckpt_path: the checkpoint's models are not those of this run ({len(other)} weights differ, such as "
            f"{other[0]}); give the same model, model.lora, algo.kl_coef and algo.value"
        )
    if broken := next((name for name, x in saved.items() if type(x) is Tensor and not bool(x.isfinite().all())), None):
        raise InputError(f"ckpt_path: weights that are no finite numbers, such as {broken}; give an earlier checkpoint")


def check_optimizer(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of the weights alone, from which training would begin anew in silence.

    Raises:
        InputError: the state of the optimiser, or of its schedule, is missing.
    """
    states = checkpoint.get("optimizer_states") or [{}]
    if not checkpoint.get("lr_schedulers") or not all({"state", "param_groups"} <= state.keys() for state in states):
        raise InputError(
            "ckpt_path: a checkpoint without the optimiser's state cannot be continued; give one that was not saved "
            "with save_weights_only"
        )


def rewind_to_step(state: LoopState, checkpoint: Mapping[str, Any], accumulate: int) -> None:
    """Go back to the first micro-batch of an optimiser step that a checkpoint interrupts.

    The gradient accumulated so far is in no checkpoint: those micro-batches are taken again, here and in
    Lightning's own count.
    """
    within = state.position % accumulate
    state.position -= within
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] if within else {}
    for counts in (progress.get("current", {}), progress.get("total", {})):
        for name in counts:
            counts[name] -= within
