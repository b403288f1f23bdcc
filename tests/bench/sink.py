"""An S3 server that keeps nothing, as fast as S3 is said to be: a delay per request, and a rate per connection.

`python -m tests.bench.sink` prints its endpoint and serves until its input ends. A local S3 server that stores is itself the
limit of what is measured. The figures are those of AWS's design patterns: 85 to 90 MB/s per connection, and tens of
milliseconds to the first byte.
"""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

SECONDS_PER_REQUEST = 0.030
BYTES_PER_SECOND = 85e6
CHUNK = 1 << 20
ETAG = '"00000000000000000000000000000000"'
_XML = "<?xml version='1.0' encoding='UTF-8'?>"


class Sink(BaseHTTPRequestHandler):
    """Whatever is put is accepted; nothing is there when it is asked for."""

    protocol_version = "HTTP/1.1"
    # Headers and body of a reply in one packet, or the client's kernel waits 40 ms for the second.
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_expect_100(self) -> bool:
        """The client waits for this before it sends the body."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def do_PUT(self) -> None:
        self._swallow()
        self._reply(200, etag=ETAG)

    def do_POST(self) -> None:
        self._swallow()
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        name = "InitiateMultipartUploadResult" if "uploads" in query else "CompleteMultipartUploadResult"
        inside = f"<Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId><ETag>{ETAG}</ETag>"
        self._reply(200, f"{_XML}<{name}>{inside}</{name}>")

    def do_GET(self) -> None:
        self._swallow()
        inside = "<Name>b</Name><Prefix/><KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
        self._reply(200, f"{_XML}<ListBucketResult>{inside}</ListBucketResult>")

    def do_HEAD(self) -> None:
        self._swallow()
        is_bucket = "/" not in urlsplit(self.path).path.strip("/")
        self._reply(200 if is_bucket else 404)

    do_DELETE = do_HEAD

    def _swallow(self) -> None:
        begin = time.monotonic()
        left = length = int(self.headers.get("Content-Length") or 0)
        buffer = bytearray(CHUNK)
        while left:
            got = self.rfile.readinto(memoryview(buffer)[: min(left, CHUNK)])
            if not got:
                return
            left -= got
            self._pause(begin + (length - left) / BYTES_PER_SECOND)
        self._pause(begin + length / BYTES_PER_SECOND + SECONDS_PER_REQUEST)

    def _pause(self, until: float) -> None:
        seconds = until - time.monotonic()
        if seconds > 0:
            time.sleep(seconds)

    def _reply(self, status: int, text: str = "", etag: str | None = None) -> None:
        self.send_response(status)
        if etag:
            self.send_header("ETag", etag)
        if text:
            self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def main() -> None:
    """Serve."""
    server = _Server(("127.0.0.1", 0), Sink)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
