"""Sampling in a thread of its own, from a copy of the policy, while the policy itself trains.

A thread and not a process: the kernels of torch run without Python's lock, there is nothing to send and nobody to
orphan. It samples token ids only; what a user writes, reward functions above all, stays in the main thread. What it
samples depends on the weights it was given and the prompts' seeds, not on how long anything takes.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import shared_weights
from lit_rlhf.rollouts.engines import ClonableEngine, RolloutEngine
from lit_rlhf.types import Rollout, SamplingConfig

_PATIENCE = 10.0  # seconds that the end of a run waits for the token being sampled


class _CancelledError(Exception):
    """Ends a rollout between two tokens."""


@dataclass(eq=False)
class Task:
    """A rollout to sample, and what became of it."""

    prompt_ids: Sequence[Sequence[int]] = ()
    seeds: Sequence[int] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: Rollout | None = None  # None until it has been sampled
    model: Any = None  # the weights, from `submit` until it has been sampled
    version: int = 0
    autocast: dict[str, Any] = field(default_factory=dict)


class AsyncSampler:
    """Samples tasks one after the other, each with the weights of the time it was submitted.

    The thread begins with the first task and ends with `close`; a task that it had not finished is kept, and sampled
    when it is asked for again.

    Args:
        engine: the thread samples with a clone of it.
        max_versions: versions of the weights that tasks may be waiting with at a time: so many copies are held.

    Raises:
        InputError: the engine cannot be cloned.
    """

    def __init__(self, engine: RolloutEngine, max_versions: int) -> None:
        if not isinstance(engine, ClonableEngine):
            raise InputError(
                f"rollout.max_staleness={max_versions} samples in a thread of its own, and {type(engine).__name__} has "
                "no clone() for it; write rollout.max_staleness=0"
            )
        self.engine, self.max_versions = engine, max_versions
        self._copies: dict[int, Any] = {}
        self._tasks: list[Task] = []  # submitted, and not known to be finished
        self._thread: _Thread | None = None
        self._end: Any = None

    @torch.no_grad()
    def submit(self, tasks: Sequence[Task], policy: nn.Module, version: int) -> None:
        """Sample these tasks with `policy`'s weights as they are now, in the calling thread's autocast.

        The copy of version v is where that of v - max_versions was, whose tasks are to be finished by now.
        """
        device = next(policy.parameters()).device.type
        autocast = {"device_type": device, "enabled": torch.is_autocast_enabled(device)}
        autocast |= {"dtype": torch.get_autocast_dtype(device)} if autocast["enabled"] else {}
        model = self._copy(getattr(policy, "_orig_mod", policy), version % self.max_versions)  # of torch.compile
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # the thread has a stream of its own
        for task in tasks:
            task.model, task.version, task.autocast = model, version, autocast
        self._tasks += tasks
        self._send(tasks)

    def result(self, task: Task) -> Rollout:
        """What was sampled; waits for it.

        Raises:
            Exception: what ended the thread, with the traceback it had there.
        """
        if task.rollout is None:
            self._send([])
        while task.rollout is None:
            self._receive(wait=True)
        return task.rollout

    def check(self) -> None:
        """Raise what ended the thread, if something did; does not wait."""
        while self._thread is not None and self._receive(wait=False):
            pass

    def close(self) -> None:
        """End the thread, in the middle of a rollout too, and let go of the copies that no task waits for."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._end()
            for task, found in thread.sent():
                self._note(task, found)
            self._copies.clear()

    def _copy(self, policy: Any, place: int) -> Any:
        """A copy of the policy as it is now; it shares what stays frozen."""
        held = self._copies.get(place)
        if held is None:
            held = self._copies[place] = copy.deepcopy(policy, shared_weights(policy)).eval()
            return held
        for old, new in zip(_tensors(held), _tensors(policy), strict=True):
            if old is not new:
                old.copy_(new)
        return held

    def _send(self, tasks: Sequence[Task]) -> None:
        if self._thread is None:
            self._thread, tasks = _Thread(self.engine.clone()), self._tasks
            self._end = weakref.finalize(self, self._thread.stop)  # also where nobody closes, and when Python ends
            self._thread.start()
        for task in tasks:
            self._thread.inbox.put(task)

    def _receive(self, wait: bool) -> bool:
        """Note one finished task; False if there is none."""
        assert self._thread is not None
        try:
            task, found = self._thread.outbox.get(block=wait)
        except Empty:
            return False
        if isinstance(found, BaseException):
            self.close()
            raise found
        self._note(task, found)
        return True

    def _note(self, task: Task, found: Any) -> None:
        if isinstance(found, Rollout):
            for tensor in (x for x in vars(found).values() if x.is_cuda):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            task.rollout, task.model = found, None
            self._tasks.remove(task)


class _Thread(threading.Thread):
    """Tasks in, pairs of a task and its rollout out; or the exception that it ended with."""

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(name="lit_rlhf.rollouts", daemon=True)
        self.engine, self.cancelled = engine, threading.Event()
        self.threads = max(1, torch.get_num_threads() // 2)  # of torch: sampling gains less by them than training
        self.inbox: SimpleQueue[Task | None] = SimpleQueue()
        self.outbox: SimpleQueue[tuple[Task, Rollout | BaseException]] = SimpleQueue()

    def run(self) -> None:
        usual = torch.get_num_threads()
        torch.set_num_threads(self.threads)  # of this thread, and of those that begin later
        reset = threading.Thread(target=torch.set_num_threads, args=(usual,))
        reset.start()
        reset.join()
        while (task := self.inbox.get()) is not None:
            try:
                found: Rollout | BaseException = self._sample(task)
            except BaseException as error:
                found = error
            self.outbox.put((task, found))
            if isinstance(found, BaseException):
                return
            del task, found  # and with them the memory, while there is nothing to do

    def stop(self) -> None:
        self.cancelled.set()
        self.inbox.put(None)
        if self is not threading.current_thread():  # which may collect the garbage
            self.join(_PATIENCE)

    def sent(self) -> Iterator[tuple[Task, Rollout | BaseException]]:
        while not self.outbox.empty():
            yield self.outbox.get()

    def _sample(self, task: Task) -> Rollout:
        hook = task.model.register_forward_pre_hook(self._between_tokens)
        try:
            with _own_stream(next(task.model.parameters()).device), torch.autocast(**task.autocast):
                self.engine.update_weights(task.model, task.version)
                return self.engine.generate(task.prompt_ids, task.sampling, task.seeds)
        finally:
            hook.remove()

    def _between_tokens(self, *_: Any) -> None:
        if self.cancelled.is_set():
            raise _CancelledError


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU a stream beside that of training, at whose end everything is there."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
        torch.cuda.current_stream().synchronize()
