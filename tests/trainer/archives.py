"""Archives for program.source."""

import gzip
import hashlib
import io
import tarfile


def archive(files: dict[str, str]) -> bytes:
    """A .tar.gz of these files, the same one each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            packed.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(buffer.getvalue(), mtime=0)


def pinned(uri: str, content: bytes) -> dict[str, str]:
    """program.source, as a manifest says it."""
    return {"archive": uri, "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"}
