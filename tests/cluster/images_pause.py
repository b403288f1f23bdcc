"""The image that holds a pod's namespaces open, made without network and compiler: its program is 12 bytes of machine code.

The program waits for ever. The container runtime ends it with SIGKILL, so it needs no signal handler, and no process
of another container is its child, so there is nothing to reap.
"""

import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

from tests.cluster.node_layout import REGISTRY

PAUSE_IMAGE = f"{REGISTRY}/pause:1"
# x86-64: mov eax, 34 (the pause system call); syscall; jmp to the start.
_CODE = bytes.fromhex("b822000000 0f05 ebf7 000000")
_BASE = 0x400000


def pause_program() -> bytes:
    """A static ELF executable: header, one loadable segment, code."""
    headers = 64 + 56
    size = headers + len(_CODE)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _BASE + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + _CODE


def write_pause_archive(path: Path) -> None:
    """Write the image as an archive that `ctr images import` and `docker load` read."""
    layer = _tar({"pause": pause_program()})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
    ).encode()
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    files = {"config.json": config, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(_tar(files))


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()
