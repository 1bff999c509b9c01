"""Rollouts sampled ahead of their turn, while the ones before are trained on: `rollout.max_staleness=k`.

    rollout j is sampled by the weights of version max(0, j - k), which had been trained on the rollouts before that

When rollout i is due, the samples of i are waited for and those of i + k begin, with the weights of now. That makes
rollout 0 the only one sampled by its own weights; of the others the version gap is recorded, `score_rollout` scores
them again with the weights that are about to be trained, and `importance_correction` weighs them. How long anything
takes changes nothing, and a checkpoint holds the samples that are not trained on yet, so that a resumed run goes on
with the same ones. Dynamic sampling's further rounds, ReMax's greedy completions and validation take the weights of
now, in the main thread. A curriculum draws by the success rates of k rollouts before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from typing_extensions import Self

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.async_ import AsyncSampler, Task
from lit_rlhf.rollouts.sampler import TRAINING, prompt_seeds
from lit_rlhf.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.on_policy import OnPolicyModule
    from lit_rlhf.rollouts.state import LoopState


@dataclass
class Ahead:
    """A rollout that is sampled before its turn."""

    iteration: int  # its number
    index: list[int]  # stream positions of its prompts on this rank
    rows: list[int]  # the same prompts' rows in the dataset
    task: Task

    def to_plain(self) -> dict[str, Any]:
        """Tensors and plain containers only, as checkpoints hold them. It has to have been sampled."""
        assert self.task.rollout is not None
        return {
            "iteration": self.iteration,
            "index": self.index,
            "rows": self.rows,
            "rollout": dict(vars(self.task.rollout)),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `to_plain`."""
        return cls(plain["iteration"], plain["index"], plain["rows"], Task(rollout=Rollout(**plain["rollout"])))


class RolloutsAhead:
    """Draws, submits and hands out the rollouts that are sampled ahead of their turn; `LoopState.ahead` holds them.

    Args:
        max_staleness: k, see above; 0 samples nothing ahead.
    """

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._sampler: AsyncSampler | None = None

    def prepare(self, module: OnPolicyModule) -> None:
        """Have a sampler, if anything is sampled ahead.

        Raises:
            InputError: the engine cannot be cloned, or no device has all of the policy.
        """
        if not self.max_staleness:
            return
        strategy = module.trainer.strategy
        whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
        if not whole or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy
            raise InputError(
                f"rollout.max_staleness={self.max_staleness} samples from a copy of the policy, and with "
                f"{type(strategy).__name__} no device has all of it; write rollout.max_staleness=0, or "
                "trainer.strategy=ddp"
            )
        if self._sampler is None:
            self._sampler = AsyncSampler(module.engine, self.max_staleness)

    def next_prompts(self, module: OnPolicyModule) -> PromptBatch:
        """The prompts of the rollout that is due; its samples are there, if they were sampled ahead.

        The rollouts up to k later are submitted.
        """
        assert module.prompts is not None
        loop = module.loop
        loop.ahead = [ahead for ahead in loop.ahead if ahead.iteration >= loop.iteration]
        if loop.ahead and loop.ahead[0].iteration == loop.iteration:
            self._wait(loop.ahead[:1])
            prompts = module.prompts.at(loop.ahead[0].index, loop.ahead[0].rows)
        else:
            prompts = module.draw_prompts(module.prompts_per_rank)
        if self._sampler is not None:
            last = loop.ahead[-1].iteration if loop.ahead else loop.iteration
            until = loop.iteration + min(self.max_staleness, _rollouts_left(module) - 1)
            new = [self._drawn(module, iteration) for iteration in range(last + 1, until + 1)]
            if new:
                with module._precision():
                    self._sampler.submit([ahead.task for ahead in new], module.models.policy, loop.iteration)
            loop.ahead += new
        return prompts

    def take(self, loop: LoopState, prompts: PromptBatch) -> Rollout | None:
        """The samples of these prompts, if they were sampled ahead for the rollout that is due."""
        due = loop.ahead and (loop.ahead[0].iteration, loop.ahead[0].index) == (loop.iteration, prompts.index)
        return loop.ahead.pop(0).task.rollout if due else None

    def finish(self, loop: LoopState) -> None:
        """Wait for all that has been submitted."""
        self._wait(loop.ahead)

    def check(self) -> None:
        """Raise what went wrong in the sampler's thread."""
        if self._sampler is not None:
            self._sampler.check()

    def close(self) -> None:
        """End the sampler's thread."""
        if self._sampler is not None:
            self._sampler.close()

    def _wait(self, ahead: list[Ahead]) -> None:
        for one in ahead:
            if self._sampler is not None:
                self._sampler.result(one.task)

    def _drawn(self, module: OnPolicyModule, iteration: int) -> Ahead:
        prompts = module.draw_prompts(module.prompts_per_rank)
        seeds = prompt_seeds(prompts, module.seed, TRAINING)
        task = Task(prompts.prompt_ids, seeds, module.sampling)
        return Ahead(iteration, prompts.index, list(prompts.rows), task)


class EndsWithFit(Callback):
    """Ends the sampler's thread however a fit ends."""

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """End the thread."""
        module.ahead.close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """End the thread."""
        module.ahead.close()


def _rollouts_left(module: OnPolicyModule) -> int:
    """Rollouts until the run ends, the one that is due included, as far as its limits tell."""
    if module.total_steps is None:
        return sys.maxsize
    steps_of_rollout = -(-int(module.trainer.num_training_batches) // module.accumulate)
    return -(-(module.total_steps - module.trainer.global_step) // steps_of_rollout)
