"""Runs in processes of their own: each may start others, one per device, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

_GRACE = 60.0  # seconds that a run has to end in once it is told to
INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes


def run_module(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m ARGUMENTS` to its end. SIGTERM and Ctrl-C reach it, too; a second Ctrl-C ends it.

    Args:
        arguments: the module and what it is given.
        environment: what it has where this process has nothing else.

    Returns:
        Its exit code; minus the number of the signal that has ended it.
    """
    process = subprocess.Popen([sys.executable, "-m", *arguments], env={**environment, **os.environ})
    previous = signal.signal(signal.SIGTERM, lambda *_: _stop(process))
    try:
        return process.wait()
    except KeyboardInterrupt:
        return _stopped(process)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Pass the signal on, so that nothing trains on without us, and end as if interrupted."""
    process.terminate()
    raise KeyboardInterrupt


def _stopped(process: subprocess.Popen[bytes]) -> int:
    """Wait for a run that is being stopped, as the terminal has told it as well; a second interrupt ends it."""
    try:
        code = process.wait(_GRACE)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        code = -signal.SIGINT
    return code or -signal.SIGINT  # it may have ended well a moment before
