"""Two libraries in turns: each in a process of its own, which trains a block of steps whenever it is told to.

The models stay warm between the blocks, the processes never compute at the same time, and each has its own peak memory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Block:
    """What a process did in one block."""

    steps: int
    seconds: float
    rollout_seconds: float
    cpu_seconds: float  # of all threads; other work on the machine changes it less
    sampled_tokens: int
    trained_tokens: int
    peak_bytes: int  # resident memory at most so far, over that before the first step


class Gate:
    """Stands before every step of a run: counts, and at the end of a block reports and waits for the next.

    Args:
        connection: to the process that waits for the reports.
        steps: optimiser steps or rollouts between two calls of `boundary`.
    """

    def __init__(self, connection: Connection, steps: int = 1) -> None:
        self._connection, self._stride = connection, steps
        self._wanted = self._before = 0
        self._start()

    def _start(self) -> None:
        self.rollout_seconds, self.sampled, self.trained = 0.0, 0, 0
        self._done, self._started, self._cpu = 0, time.perf_counter(), time.process_time()

    def boundary(self) -> None:
        """Before a step, and so after the last one."""
        if self._wanted and self._done + self._stride < self._wanted:
            self._done += self._stride
            return
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        if not self._wanted:  # before the first step
            forget_peak()
            self._before = memory("VmRSS")
        peak = memory("VmHWM") - self._before
        counted = self.sampled, self.trained
        self._connection.send(Block(self._wanted, seconds, self.rollout_seconds, cpu, *counted, peak))
        self._wanted = self._connection.recv()
        self._start()


class Worker:
    """A process in which `train(work, gate)` runs, from one block to the next."""

    def __init__(self, train: Callable[[Any, Connection], None], work: Any, threads: int) -> None:
        os.environ.update({name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(train, work, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # it stands before its first step

    def run(self, steps: int) -> Block:
        """Train `steps` steps."""
        self._connection.send(steps)
        return self._receive()

    def _receive(self) -> Block:
        try:
            found = self._connection.recv()
        except EOFError:
            raise SystemExit("a worker ended without a word") from None
        if isinstance(found, str):
            raise SystemExit(f"a worker failed:\n{found}")
        return found

    def close(self) -> None:
        """End the process, in the middle of its run."""
        self._process.kill()
        self._process.join()


def _serve(train: Callable[[Any, Connection], None], work: Any, threads: int, connection: Connection) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        train(work, connection)
        connection.send("the run ended before it was told to")
    except (EOFError, BrokenPipeError):  # nobody waits any more
        return
    except BaseException:
        connection.send(traceback.format_exc())


def memory(name: str) -> int:
    """Bytes of this process: `VmRSS` resident now, `VmHWM` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def forget_peak() -> None:
    """Begin anew to look for the peak of the resident memory, without what is free but still held."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
