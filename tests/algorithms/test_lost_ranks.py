"""A rank that dies or hangs: the others say so, with their rank and step, and none waits for ever."""

import multiprocessing
import os
import re
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from lightning.pytorch import Trainer

from lit_rlhf import strategies
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.lost_ranks import LostRanks
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.cli import _LOST_RANK
from lit_rlhf.data.modules import RowsDataModule
from tests.helpers import build, prompt_rows

STRATEGIES = {"ddp": strategies.ddp, "fsdp2": strategies.FSDP2Strategy}


class Leaves(SFT):
    """Rank 1 ends, or never comes back, in its third step."""

    how = ""

    def training_step(self, batch, batch_idx=0):
        if self.how == "cannot save" and self.global_step == 2:
            self.trainer.save_checkpoint(f"{os.devnull}/last.ckpt")
        if self.rank == 1 and self.global_step == 2:
            os._exit(0) if self.how == "dies" else threading.Event().wait()
        return super().training_step(batch, batch_idx)


def rank(number, port, strategy, how, told):
    """One of two ranks as a launcher would start it."""
    os.environ |= {"LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Leaves.how = how
    rows = [{**row, "completion": "5 6 7"} for row in prompt_rows(16)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](timeout=5),
        max_epochs=4,
        limit_val_batches=0,
        plugins=[AtomicCheckpointIO()],
        **quiet,
    )
    try:
        trainer.fit(build(Leaves, batch_size=8), datamodule=RowsDataModule(rows))
    except BaseException as error:
        told.put(str(error))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?",
            "another rank has ended",
        ),
        ("ncclRemoteError: remote process exited or there was a network error", "another rank has ended"),
        (
            "Watchdog caught collective operation timeout: WorkNCCL(Timeout(ms)=5)",
            "another rank has not answered in time",
        ),
        ("wait timeout after 5000ms, keys: /default_pg/0", "another rank has not answered in time"),
        ("ncclUnhandledCudaError: out of memory, WorkNCCL(Timeout(ms)=5)", "a collective has failed"),
    ],
)
def test_what_a_collective_says_decides_what_is_said_of_it(text, what):
    error = dist.DistBackendError(text)
    place = SimpleNamespace(global_rank=3, global_step=12, strategy=SimpleNamespace())
    LostRanks().on_exception(place, None, error)
    assert str(error).startswith(f"rank 3, step 12: {what}")
    assert text in str(error)
    assert _LOST_RANK.match(str(error)), "the command line makes one sentence of it"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("dies", "rank 0, step [12]: another rank has ended; its own output says why"),
        ("hangs", "rank 0, step [12]: another rank has not answered within 5 seconds; it hangs"),
    ],
)
def test_the_rank_that_is_left_says_where(how, sentence, strategy):
    with two_ranks(strategy, how) as told:
        assert re.match(sentence, told.get(timeout=60))  # rank 1 may be a step ahead


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_first_rank_cannot_save_is_one_sentence_of_all(strategy):
    with two_ranks(strategy, "cannot save") as told:
        said = {told.get(timeout=60) for _ in range(2)}
    assert said == {"the checkpoint /dev/null/last.ckpt could not be written (File exists): put that right"}


@contextmanager
def two_ranks(strategy, how):
    """The queue in which two ranks tell what ended them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    ranks = [context.Process(target=rank, args=(i, port, strategy, how, told)) for i in (0, 1)]
    for process in ranks:
        process.start()
    try:
        yield told
    finally:
        for process in ranks:
            process.kill()
            process.join()
