"""When another rank is gone or hangs, say so: which rank noticed, at which step, and where to look."""

from __future__ import annotations

import re

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

_ENDED = re.compile(
    "closed by peer|reset by peer|broken pipe|connection refused|got 0 bytes|likely closed|remote process exit",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed out|time ?out\b(?!\()", re.IGNORECASE)  # NCCL says `Timeout(ms)=` of any collective


class LostRanks(Callback):
    """Puts rank and step in front of what a collective says when it fails, which is low-level and names neither.

    Ranks wait `trainer.strategy.timeout` seconds for each other. NCCL's own watchdog may end the process before Python
    hears of it; its log then names the rank and the collective.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Rewrite the message in place, so that all else that Lightning does about an error goes on."""
        if not of_collective(exception):
            return
        text = " ".join(str(exception).split())
        timeout = getattr(trainer.strategy, "_timeout", None)
        if _ENDED.search(text):
            what = "another rank has ended; its own output says why"
        elif _LATE.search(text):
            seconds = "in time" if timeout is None else f"within {timeout.total_seconds():g} seconds"
            what = (
                f"another rank has not answered {seconds}; it hangs, which its own output may tell, or is slow, and "
                "trainer.strategy.timeout has to be longer"
            )
        else:
            what = "a collective has failed"
        exception.args = (f"rank {trainer.global_rank}, step {trainer.global_step}: {what} ({text[:400]})",)


def of_collective(error: BaseException) -> bool:
    """Whether this is what gloo, NCCL or torch's store raise when ranks lose each other."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
