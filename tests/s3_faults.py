"""A proxy before a real S3 server that refuses or holds up the requests that a test chooses."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>not now</Message></Error>"
# Of one hop, not of the message.
_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "expect"})


class FaultyS3:
    """`refuse` and `hold` judge each request by method and path; held ones wait for `release`."""

    def __init__(self, upstream: str) -> None:
        self.refuse: Callable[[str, str], bool] = lambda _method, _path: False
        self.hold: Callable[[str, str], bool] = lambda _method, _path: False
        self.release = threading.Event()
        self.seconds_per_put = 0.0
        self.refused: list[str] = []
        self.held: list[str] = []
        self._upstream = urlsplit(upstream).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.refuse(self.command, self.path):
                    proxy.refused.append(self.path)
                    self.reply(403, [("Content-Type", "application/xml")], _DENIED)
                    return
                if proxy.hold(self.command, self.path):
                    proxy.held.append(self.path)
                    proxy.release.wait()
                elif self.command == "PUT" and proxy.seconds_per_put:
                    threading.Event().wait(proxy.seconds_per_put)
                upstream = http.client.HTTPConnection(proxy._upstream, timeout=60)
                try:
                    # The signature covers the Host that the client knows: it stays.
                    headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                    upstream.request(self.command, self.path, body, headers)
                    got = upstream.getresponse()
                    self.reply(got.status, got.getheaders(), got.read())
                finally:
                    upstream.close()

            def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = next((v for n, v in headers if n.lower() == "content-length"), "0")
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Nothing."""

        return Handler


@contextmanager
def faulty(upstream: str) -> Iterator[FaultyS3]:
    """For the length of a test."""
    proxy = FaultyS3(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
