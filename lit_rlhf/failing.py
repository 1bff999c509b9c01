"""The end of a run that cannot go on: one sentence on stderr, said once by however many processes there are."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

from lit_rlhf.confidential import masked

_PATIENCE = timedelta(seconds=10)  # for another process to come to its own sentence
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in what other libraries say
_SAID, _HEARD = "lit_rlhf/said", "lit_rlhf/heard/{}"


def fail(sentence: str, code: int = 2) -> NoReturn:
    """End the process with what went wrong; the code is 2 where the user got it wrong.

    Of several processes the first says what the user got wrong; another one says, with its rank, what that has not.
    """
    line = one_line(sentence)
    rank, size = _place()
    store = _meeting_point() if size > 1 and code == 2 else None
    if not rank or code != 2:
        print(f"error: {line}", file=sys.stderr, flush=True)
        _say(store, line, size)
    elif not _is_said(store, line, rank):
        print(f"error: rank {rank}: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def one_line(sentence: str) -> str:
    """What an error says, without secrets, colours and line ends."""
    return masked(" ".join(_STYLE.sub("", sentence).split()))


def mask_traceback() -> None:
    """Let the traceback of an error that ends the process be told without secrets.

    To be called last: W&B and torch print it from hooks of their own, which they install when a run begins.
    """
    hook = sys.excepthook

    def tell(*error: Any) -> None:
        stderr, sys.stderr = sys.stderr, io.StringIO()
        try:
            hook(*error)
        finally:
            told, sys.stderr = sys.stderr.getvalue(), stderr
            print(masked(told), end="", file=sys.stderr, flush=True)

    sys.excepthook = tell


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are, from where they have met or else from who started them."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
    rank, size = (
        next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), default)
        for names, default in ((("RANK", "SLURM_PROCID", "LOCAL_RANK"), 0), (("WORLD_SIZE", "SLURM_NTASKS"), 1))
    )
    return int(rank), int(size)


def _meeting_point() -> Any:
    """The store that the processes of this run have met at, or will; None where nobody knows of any."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_PATIENCE)
    except (RuntimeError, ValueError):  # nobody is there
        return None


def _say(store: Any, line: str, size: int) -> None:
    """Let the others know, and stay until they do: the store may end with this process."""
    if store is not None:
        with suppress(RuntimeError):  # those that have met no error do not answer
            store.set(_SAID, line)
            store.wait([_HEARD.format(rank) for rank in range(1, size)], _PATIENCE)


def _is_said(store: Any, line: str, rank: int) -> bool:
    if store is not None:
        with suppress(RuntimeError):
            store.wait([_SAID], _PATIENCE)
            said = store.get(_SAID).decode()
            store.set(_HEARD.format(rank), "yes")
            return bool(said == line)
    return False
