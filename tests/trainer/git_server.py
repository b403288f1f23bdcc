"""A Git repository behind Git's own HTTP backend, as hosters serve it: any commit may be asked for, by its id."""

import os
import ssl
import subprocess
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.http_double import HttpDouble, QuietHandler

_AUTHOR = {f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *arguments: str) -> str:
    """Run the command in a folder; what it prints."""
    command = ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | _AUTHOR, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: Path, message: str = "x") -> str:
    """Commit all that is in a folder; the commit's id."""
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={message}")
    return git(folder, "rev-parse", "HEAD")


@contextmanager
def serving(folder: Path, *, token: str | None = None, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """URL of the repository in `folder`. With a token it is for who has it; with `tls`, at https://localhost."""
    backend = Path(git(folder, "--exec-path")) / "git-http-backend"

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            expected = f"Basic {b64encode(f'x-token-auth:{token}'.encode()).decode()}"
            if token is not None and self.headers.get("Authorization") != expected:
                self.send_error(401)
                return
            path, _, query = self.path.partition("?")
            done = subprocess.run(
                [str(backend)], input=self.body(), env=self._cgi(path, query), check=False, capture_output=True
            )
            head, _, content = done.stdout.partition(b"\r\n\r\n")
            headers = dict(line.split(": ", 1) for line in head.decode().splitlines())
            self.reply(int(headers.pop("Status", "200").split()[0]), content, headers)

        def do_POST(self) -> None:
            self.do_GET()

        def _cgi(self, path: str, query: str) -> dict[str, str]:
            settings = {"uploadpack.allowAnySHA1InWant": "true", "safe.directory": "*"}
            numbered = enumerate(settings.items())
            config = {
                f"GIT_CONFIG_{part}_{n}": x
                for n, pair in numbered
                for part, x in zip(("KEY", "VALUE"), pair, strict=True)
            }
            return os.environ | config | {
                "GIT_CONFIG_COUNT": str(len(settings)),
                "GIT_PROJECT_ROOT": str(folder.parent),
                "GIT_HTTP_EXPORT_ALL": "1",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            }  # fmt: skip

    with HttpDouble(Handler, tls) as double:
        yield f"{double.uri}/{folder.name}/.git"
