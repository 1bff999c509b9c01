"""`python guard.py FOLDER COMMAND ...`: run a command until it ends or whoever started this process is gone.

The starter keeps the other end of this process's standard input and writes nothing to it. End of file means that it has
closed it or that it is no more, killed by whatever signal; then the folder, which was there for the command alone, is
removed. Standard library only, in a session of its own: whatever the command has started ends with it.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

GRACE = 8.0  # seconds to end by itself
OTHERS = 2.0  # seconds for what it has started, of which one removes the shared memory of the others


def main() -> None:
    """Start the command and wait."""
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    orphaned = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: command.terminate())
    threading.Thread(target=_watch_starter, args=(command, orphaned), daemon=True).start()
    command.wait()
    os.killpg(0, signal.SIGTERM)  # the command's own children; there is no command any more
    deadline = time.monotonic() + OTHERS
    while _others() and time.monotonic() < deadline:
        time.sleep(0.02)
    if orphaned.is_set():
        shutil.rmtree(sys.argv[1], ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _watch_starter(command: subprocess.Popen[bytes], orphaned: threading.Event) -> None:
    while os.read(0, 1):
        pass
    orphaned.set()
    command.terminate()
    try:
        command.wait(GRACE)
    except subprocess.TimeoutExpired:
        command.kill()


def _others() -> bool:
    """Whether there is another process in this one's group, as far as Linux can tell."""
    mine = os.getpid()
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
        except (OSError, ValueError):  # it has just ended
            continue
        if int(group) == mine != int(stat.parent.name) and state != "Z":
            return True
    return False


if __name__ == "__main__":
    main()
