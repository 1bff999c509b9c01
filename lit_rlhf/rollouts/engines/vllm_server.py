"""Sampling with vLLM servers: started here, or found at URLs, on as many machines as there are.

Prompts are spread over the servers, every rank asks for its own. Weights go through a folder that both sides see: the
first rank writes them, every server reads them. A server of our own that died is started from that folder, and so with
the weights of now; the prompts that it had are then sampled again with the seeds they had.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.client import NOT_FOUND
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeAlias

import torch

from lit_rlhf.errors import InputError, check_number
from lit_rlhf.ranks import gather_objects, is_first
from lit_rlhf.rollouts.engines.base import EngineError, EngineTimeoutError
from lit_rlhf.rollouts.engines.http import KEY, RefusedError, Server, ServerGoneError
from lit_rlhf.rollouts.engines.server_process import ServerProcess, free_ports, serve_command
from lit_rlhf.rollouts.engines.vllm import ENVIRONMENT, Sample, VLLMBase, check_installed
from lit_rlhf.rollouts.engines.weights import checkpoint_of, write_config, write_weights

Lost: TypeAlias = dict[Server, ServerGoneError]  # servers that are gone, and how one knows
EVERYWHERE = ("0.0.0.0", "::")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEV_MODE = "VLLM_SERVER_DEV_MODE"  # environment variable, without which a vLLM server takes no weights
_REQUESTS = 64  # prompts under way at a time, at each server
_TRIES = 3  # times that the same work is begun, each after the servers lost in it have come back
_POLL = 0.2  # seconds between looks at a server that starts


@dataclass
class _Held:
    """What has to be put away: servers of our own, and the folder of their weights."""

    processes: list[ServerProcess] = field(default_factory=list)
    folder: Path | None = None

    def close(self) -> None:
        for process in self.processes:
            process.let_go()
        while self.processes:
            self.processes.pop().close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


class VLLMServerEngine(VLLMBase):
    """A `RolloutEngine` that samples with `vllm serve`, one or several.

    Args:
        eos_token_ids: tokens that end a completion; they belong to it.
        pad_token_id: fills the unused cells.
        stop_token_ids: further tokens that end a completion.
        urls: servers that run already, such as `["http://node1:8000"]`, started as docs/vllm.md says. Without any,
            servers are started on this machine.
        servers: how many to start.
        host: the address that they listen on. Whoever reaches it can use them: other machines do only where it is not
            the loopback's.
        gpus: the GPUs of the servers started here, dealt out evenly; by default all that are visible to each.
        folder: where weights are written, a folder that the servers at `urls` read by the same path; it may be left
            out where they run on this machine.
        logs: a folder for what the servers started here print; by default it is gone with them.
        dtype: of vLLM's weights and arithmetic, `"float32"` or `"bfloat16"`; by default the policy's.
        timeout: seconds that a rollout may take, and a server to read new weights.
        startup_timeout: seconds that a server started here may take until it answers.
        options: further arguments of `vllm serve`, such as `{"max_model_len": 4096}`.

    Raises:
        InputError: something that no server can be started or found with.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_token_ids: Sequence[int] = (),
        *,
        urls: Sequence[str] = (),
        servers: int = 1,
        host: str = LOOPBACK[0],
        gpus: Sequence[int] | None = None,
        folder: str | None = None,
        logs: str | None = None,
        dtype: str | None = None,
        timeout: float = 600.0,
        startup_timeout: float = 600.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(eos_token_ids, pad_token_id, stop_token_ids, dtype=dtype, timeout=timeout, options=options)
        self._found = [Server(url) for url in ([urls] if isinstance(urls, str) else urls)]
        self.count, self.host, self.gpus, self.startup_timeout = servers, host, gpus, startup_timeout
        self._folder, self._logs = (None if path is None else Path(path).expanduser() for path in (folder, logs))
        self._check_found() if self._found else self._check_own()
        self._servers: list[Server] = []  # that sample; every rank knows them
        self._label = ""  # of the weights that were pushed last
        self._held = _Held()

    def _check_found(self) -> None:
        if self.count != 1 or self.gpus is not None or self.options:
            raise InputError(
                "engine.servers, engine.gpus and engine.options are of servers started here, and those at engine.urls "
                "run already; leave them out"
            )
        far = [server.url for server in self._found if server.host not in LOOPBACK]
        if far and self._folder is None:
            raise InputError(f"engine.folder is missing: {far[0]} reads the weights from a folder that it sees, too")

    def _check_own(self) -> None:
        check_number("engine.servers", self.count, at_least=1)
        check_number("engine.startup_timeout", self.startup_timeout, above=0)
        check_installed("engine=vllm_server without engine.urls")
        if self.host in EVERYWHERE:
            raise InputError(
                f"engine.host={self.host} listens to everybody and is no address to be reached at; give one of this "
                "machine's, in a network that you trust"
            )
        if self.gpus is not None and (not len(self.gpus) or len(self.gpus) % self.count):
            raise InputError(f"engine.gpus: {len(self.gpus)} GPUs do not divide over engine.servers={self.count}")
        if "api_key" in self.options:
            raise InputError(
                f"engine.options.api_key would stand on a command line for all to see; set the variable {KEY} instead"
            )

    def close(self) -> None:
        """End the servers started here and remove the weights; the next `update_weights` starts them again."""
        self._held.close()
        self._servers, self._pushed = [], None

    # -- weights ---------------------------------------------------------------------------------------------------

    def _push(self, policy: Any, dtype: torch.dtype) -> None:
        """The first rank writes the weights and has the servers read them; the others learn where they are."""
        error: Exception | None = None
        if is_first():
            try:
                self._publish(policy, dtype)
            except Exception as raised:
                error = raised
        reports = gather_objects((error, [server.url for server in self._servers], self._label, socket.gethostname()))
        error, urls, self._label, machine = reports[0]
        if error is not None:
            self.close()
            raise error
        self._servers = [Server(url) for url in urls]
        away = [report[-1] for report in reports if report[-1] != machine]
        if away and not self._found and self.host in LOOPBACK:
            raise InputError(
                f"engine.host={self.host}: {away[0]} cannot reach the servers of {machine} there; give an address of "
                f"{machine} in the cluster's own network, or start servers by hand and give engine.urls"
            )

    def _publish(self, policy: Any, dtype: torch.dtype) -> None:
        if self._held.folder is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._held.folder = Path(tempfile.mkdtemp(prefix="lit_rlhf-", dir=self._folder)).resolve()
            Finalize(self, self._held.close, exitpriority=0)  # forgotten, or at the end of this process, forks excluded
            write_config(policy, self._held.folder, dtype)
        write_weights(checkpoint_of(policy, dtype), self._held.folder)
        if not self._servers and not self._found:
            self._start(self._held.folder, dtype)  # which read what lies there
            return
        self._servers, self._label = self._servers or self._found, uuid.uuid4().hex
        self._persist(lambda: _at_once([(s, partial(self._reload, s)) for s in self._servers], len(self._servers)))

    def _reload(self, server: Server) -> None:
        """Have a server read the weights, and forget what it has computed with others."""

        def post(path: str, body: Any = None) -> Any:
            return server.call("POST", path, body, timeout=self.timeout)

        try:
            post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._held.folder)}})
            if post("/reset_prefix_cache") == {"success": False}:
                raise EngineError(f"the vLLM server {server.url} is sampling for others; it has to be this run's")
            post("/update_weight_version", {"new_version": self._label})
        except RefusedError as error:
            if error.status != NOT_FOUND:
                raise
            raise EngineError(
                f"the vLLM server {server.url} takes no weights; start it with {DEV_MODE}=1 in its environment, where "
                "nobody but you reaches it"
            ) from None

    # -- servers ---------------------------------------------------------------------------------------------------

    def _start(self, folder: Path, dtype: torch.dtype) -> None:
        logs = self._logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        for k, port in enumerate(free_ports(self.host, self.count)):
            server = Server(f"http://{self.host}:{port}")
            environment = {**{name: os.environ.get(name, x) for name, x in ENVIRONMENT.items()}, DEV_MODE: "1"}
            options = dict(self.options)
            if self.gpus is not None:
                gpus = self.gpus[k :: self.count]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
                options = {"tensor_parallel_size": len(gpus), **options}
            command = serve_command(folder, self.host, port, dtype, options)
            self._held.processes.append(ServerProcess(command, server, environment, logs / f"vllm-{k}.log", folder))
            self._servers.append(server)
        for server in self._servers:
            self._wait_for(server)

    def _persist(self, work: Callable[[], Lost]) -> None:
        """Begin the work until no server is lost in it; those that were have to come back first."""
        for _ in range(_TRIES):
            if not (lost := work()):
                return
            for server, reason in lost.items():
                if self._found:
                    raise EngineError(
                        f"the vLLM server {server.url} has failed or does not answer ({reason}); see whether it runs "
                        f"and reads {self._held.folder or self._folder}, and continue from the last checkpoint"
                    )
                self._wait_for(server)
        server, reason = next(iter(lost.items()))
        raise EngineError(f"the vLLM server {server.url} has failed {_TRIES} times at the same work ({reason})")

    def _wait_for(self, server: Server) -> None:
        """Wait until a server started here answers.

        Raises:
            EngineError: it cannot be started, or takes too long.
        """
        process = next((p for p in self._held.processes if p.server.url == server.url), None)
        deadline = time.monotonic() + self.startup_timeout
        while not server.is_up():
            if process is not None and process.failed:
                log = f"; its log is {process.log}" if self._logs else ""
                raise EngineError(f"vllm serve has ended before it answered: {process.last_words()}{log}")
            if time.monotonic() > deadline:
                raise EngineTimeoutError(
                    f"the vLLM server {server.url} has not answered within engine.startup_timeout="
                    f"{self.startup_timeout:g} seconds; raise it, or see its log"
                )
            time.sleep(_POLL)
        if process is not None:
            process.answered.set()

    # -- sampling --------------------------------------------------------------------------------------------------

    def _sample(
        self, prompt_ids: Sequence[Sequence[int]], arguments: Sequence[dict[str, Any]], at_a_time: int
    ) -> list[list[Sample]]:
        found: dict[int, list[Sample]] = {}
        threads = min(len(prompt_ids), at_a_time, _REQUESTS * len(self._servers))

        def sample_missing() -> Lost:
            deadline = time.monotonic() + self.timeout

            def sample(i: int, server: Server) -> None:
                body = {"token_ids": list(prompt_ids[i]), "sampling_params": arguments[i]}
                found[i] = self._asked(server, body, deadline - time.monotonic())

            missing = [(i, self._servers[i % len(self._servers)]) for i in range(len(prompt_ids)) if i not in found]
            return _at_once([(server, partial(sample, i, server)) for i, server in missing], threads)

        self._persist(sample_missing)
        return [found[i] for i in range(len(prompt_ids))]

    def _asked(self, server: Server, body: dict[str, Any], timeout: float) -> list[Sample]:
        """The completions of one prompt, in their order."""
        try:
            answer = server.call("POST", "/inference/v1/generate", body, timeout=timeout)
        except RefusedError as error:
            if error.status != NOT_FOUND:
                raise
            raise EngineError(
                f"the vLLM server {server.url} takes no token ids; start it with --enable-scale-out"
            ) from None
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            samples = [Sample(c["token_ids"], [x["logprob"] for x in c["logprobs"]["content"]]) for c in choices]
            versions = {part["version"] for choice in choices for part in choice["weight_versions"]}
        except (KeyError, TypeError) as error:
            raise EngineError(f"the vLLM server {server.url} answers without {error}; see docs/vllm.md") from None
        if self._found and versions != {self._label}:  # one of ours has those of now, whenever it was started
            raise EngineError(
                f"the vLLM server {server.url} has other weights than it was given: it was started again, or "
                "another run uses it; continue from the last checkpoint, with a server of this run's own"
            )
        return samples


def _at_once(jobs: Sequence[tuple[Server, Callable[[], Any]]], threads: int) -> Lost:
    """Do the jobs in so many threads; returns the servers that were lost in theirs."""
    lost: Lost = {}

    def do(job: tuple[Server, Callable[[], Any]]) -> None:
        try:
            job[1]()
        except ServerGoneError as error:
            lost[job[0]] = error

    pool = ThreadPoolExecutor(threads)
    try:
        list(pool.map(do, jobs))
    finally:  # without waiting: whoever interrupts may have to end the servers first
        pool.shutdown(wait=False, cancel_futures=True)
    return lost
