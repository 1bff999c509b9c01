"""JSON over HTTP with the servers of a sampler: a time limit on every call, and errors that say which server."""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines.base import EngineError, EngineTimeoutError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

KEY = "VLLM_API_KEY"  # environment variable, read by vLLM's server and here; a key on a command line is seen by all
_CONNECT = 20.0  # seconds
_SHOWN = 300  # characters of a server's answer


class ServerGoneError(Exception):
    """The server does not answer, or ended while it did."""


class RefusedError(EngineError):
    """The server answers with an error that is the asker's."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class _Until(io.RawIOBase):
    """What arrives on a socket until a deadline (`time.monotonic`); a socket's own timeout is for each part of it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._arriving, self._deadline = sock, sock.makefile("rb", buffering=0), deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout  # noqa: UP041
        self._sock.settimeout(left)
        return self._arriving.readinto(buffer)

    def close(self) -> None:
        self._arriving.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that has to be there, head and body, by a deadline."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, deadline))


class Server:
    """A server at a URL.

    Args:
        url: such as `http://127.0.0.1:8000`.

    Raises:
        InputError: it is no URL of http or https.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise InputError(f"engine.urls: {_without_login(url)!r} is no server; write such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path.rstrip("/")
        self.connection: type[http.client.HTTPConnection] = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )

    def call(self, method: str, path: str, body: Any = None, *, timeout: float) -> Any:
        """The server's answer, from JSON; None where it is empty or something else.

        Raises:
            ServerGoneError: the connection fails, or the server says that it has failed itself.
            EngineTimeoutError: the answer is not there, to its end, within `timeout` seconds.
            RefusedError: the server refuses.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        connection = self.connection(self.host, self.port, timeout=_CONNECT)
        try:
            self._connect(connection, timeout)
            connection.request(method, self.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read().decode(errors="replace")
        except socket.timeout:  # noqa: UP041  # Python 3.10 has two names for it
            raise EngineTimeoutError(
                f"the vLLM server {self.url} has not answered {path} within {timeout:.0f} seconds; raise "
                "engine.timeout, or see what keeps it busy"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerGoneError(f"{type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status >= http.client.INTERNAL_SERVER_ERROR:
            raise ServerGoneError(f"{response.status} {path}: {_message(content)}")
        if response.status != http.client.OK:
            raise RefusedError(
                f"the vLLM server {self.url} refuses {path}: {response.status} {_message(content)}", response.status
            )
        try:
            return json.loads(content)
        except ValueError:
            return None

    def _connect(self, connection: http.client.HTTPConnection, timeout: float) -> None:
        """Connect, soon or not at all; then the server has `timeout` seconds for its answer."""
        try:
            connection.connect()
        except OSError as error:
            raise ServerGoneError(f"no connection: {type(error).__name__}: {error}") from None
        assert connection.sock is not None
        connection.sock.settimeout(max(timeout, 0.001))
        deadline = time.monotonic() + timeout
        connection.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]

    def is_up(self, timeout: float = 5.0) -> bool:
        """Whether it is ready to sample."""
        try:
            self.call("GET", "/health", timeout=timeout)
        except (ServerGoneError, EngineError):
            return False
        return True


def _message(content: str) -> str:
    """What a server says of an error, in one line."""
    try:
        found = json.loads(content)
        found = found.get("error", found.get("detail", found))
        content = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError):
        pass
    line = " ".join(content.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _without_login(url: str) -> str:
    scheme, _, rest = url.rpartition("//")
    return f"{scheme}//{rest.rpartition('@')[2]}" if scheme else rest.rpartition("@")[2]
