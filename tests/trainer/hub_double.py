"""The Hub's API as far as a preflight goes: what a repository has, and its files, which a gated one shows nobody."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from tests.http_double import HttpDouble, QuietHandler

SHA = "1" * 40


@contextmanager
def hub(models: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """Serve folders as model repositories; the endpoint."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = next((name for name in models if f"/{name}/" in f"{path}/"), None)
            if name is None:
                self._answer(404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": SHA}
                    for f in sorted(models[name].iterdir())
                ]
                self._answer(200, json.dumps(tree).encode())
            elif path.startswith("/api/"):
                files = [{"rfilename": f.name, "size": f.stat().st_size} for f in sorted(models[name].iterdir())]
                body = {"id": name, "sha": SHA, "siblings": files, "gated": "manual" if name in gated else False}
                self._answer(200, json.dumps(body).encode())
            elif name in gated:
                self._answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
            else:
                self._answer(200, (models[name] / path.rpartition("/")[2]).read_bytes())

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            named = {"X-Repo-Commit": SHA, "ETag": f'"{crc32(self.path.encode()):08x}"'}
            self.reply(status, body, {**named, **(headers or {})})

    with HttpDouble(Handler) as double:
        yield double.uri
