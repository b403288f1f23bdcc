"""A proxy before a real S3 server: it refuses, holds up, slows down, loses or answers nothing, as a test chooses."""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseServer
from typing import Any
from urllib.parse import urlsplit

_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>not now</Message></Error>"
# Of one hop, not of the message.
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "expect"})

Judge = Callable[[str, str], bool]
_Answer = tuple[int, list[Any], bytes]


@dataclass(frozen=True)
class Held:
    """A request that waits: its path, and the port by which its sender can be told."""

    path: str
    port: int


class Gate:
    """Holds up the requests that `matches` chooses, or with `replies` what the server answered them, until it is opened."""

    def __init__(self, matches: Judge, *, replies: bool = False) -> None:
        self.matches = matches
        self.replies = replies
        self.held: list[Held] = []
        self.passed: list[Held] = []
        self._opened = threading.Event()
        self._loses = False

    def open(self, *, lose: bool = False) -> None:
        """Let them go on, and others pass from now on; or cut the connections of those that are held."""
        self._loses = lose
        self._opened.set()

    @property
    def is_open(self) -> bool:
        return self._opened.is_set()

    def lead(self, held: Held, ask: Callable[[], _Answer | None]) -> _Answer | None:
        """Hold one up, and have it asked for before or after that; None if it is lost."""
        answer = ask() if self.replies else None
        self.held.append(held)
        self._opened.wait()
        if self._loses:
            return None
        if not self.replies:
            answer = ask()
        self.passed.append(held)
        return answer


@dataclass(frozen=True)
class Line:
    """A slow line to the server: what each request waits, and what all bodies share."""

    seconds: float
    bytes_per_second: float


class FaultyS3:
    """`refuse` judges each request by method and path; `hold` puts a gate in the way; until `down_until` nothing is answered.

    `line` slows all of them down.
    """

    def __init__(self, upstream: str, address: str = "127.0.0.1") -> None:
        self.refuse: Judge = lambda _method, _path: False
        self.seconds_per_put = 0.0
        self.down_until = 0.0
        self.line: Line | None = None
        self.refused: list[str] = []
        self._gates: list[Gate] = []
        self._upstream = urlsplit(upstream).netloc
        self._transfer = threading.Lock()
        self._count = threading.Lock()
        self._on_their_way = 0
        self._address = address
        self._server = _Server((address, 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://{self._address}:{self._server.server_address[1]}"

    def hold(self, matches: Judge, *, replies: bool = False) -> Gate:
        """A gate for the requests of this kind."""
        gate = Gate(matches, replies=replies)
        self._gates.append(gate)
        return gate

    def close(self) -> None:
        for gate in self._gates:
            gate.open()
        self._server.shutdown()
        self._server.server_close()

    @property
    def is_down(self) -> bool:
        return time.monotonic() < self.down_until

    @property
    def is_quiet(self) -> bool:
        """No request is on its way, but for those that a gate holds. One whose sender is dead may still arrive."""
        return self._on_their_way == 0

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._count:
            self._on_their_way += 1
        try:
            yield
        finally:
            with self._count:
                self._on_their_way -= 1

    def _answer(self, method: str, path: str, body: bytes, headers: dict[str, str], port: int) -> _Answer | None:
        """What to reply; None to cut the connection."""
        if self.is_down:
            return None
        if self.refuse(method, path):
            self.refused.append(path)
            return 403, [("Content-Type", "application/xml")], _DENIED
        gate = next((gate for gate in self._gates if not gate.is_open and gate.matches(method, path)), None)
        if gate is None:
            with self._counted():
                if method == "PUT" and self.seconds_per_put:
                    threading.Event().wait(self.seconds_per_put)
                return self._ask(method, path, body, headers)
        return gate.lead(Held(path, port), lambda: self._ask(method, path, body, headers))

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> _Answer | None:
        if self.line is not None:
            threading.Event().wait(self.line.seconds)
        self._carry(body)
        upstream = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            upstream.request(method, path, body, headers)
            got = upstream.getresponse()
            found = got.read()
            self._carry(found)
            return got.status, got.getheaders(), found
        except (OSError, http.client.HTTPException):
            return None
        finally:
            upstream.close()

    def _carry(self, body: bytes) -> None:
        """Take the time that the line takes for a body."""
        if self.line is not None:
            with self._transfer:
                threading.Event().wait(len(body) / self.line.bytes_per_second)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                # The signature covers the Host that the client knows: it stays.
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                answer = proxy._answer(self.command, self.path, body, headers, self.client_address[1])
                if answer is None:
                    self.close_connection = True
                else:
                    self.reply(*answer)

            def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = next((v for n, v in headers if n.lower() == "content-length"), "0")
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                # A client that was killed does not listen.
                with suppress(ConnectionError):
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nothing."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self: BaseServer, request: Any, client_address: Any) -> None:
        """Nothing: clients are killed in the middle of a request."""


@contextmanager
def faulty(upstream: str, address: str = "127.0.0.1") -> Iterator[FaultyS3]:
    """For the length of a test, on an address of this machine."""
    proxy = FaultyS3(upstream, address)
    try:
        yield proxy
    finally:
        proxy.close()
