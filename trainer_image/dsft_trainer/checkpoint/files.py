"""Files of a checkpoint on their way to storage and back: a manifest keeps sizes and SHA-256, which are checked at reading."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.store import ObjectMissingError, Store, get_files, in_parallel


def upload(store: Store, folder: Path, key: str, rank: int) -> tuple[CommittedFile, ...]:
    """Move all files below `folder` to `key`/; what a manifest says of them. `folder` may lose them."""

    def send(path: Path) -> CommittedFile:
        name, size, digest = path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)
        store.put_file(path, f"{key}/{name}")
        return CommittedFile(path=name, size=size, sha256=digest, rank=rank)

    return tuple(in_parallel(send, sorted(path for path in folder.rglob("*") if path.is_file())))


def missing(store: Store, key: str, files: Iterable[CommittedFile]) -> list[str]:
    """Those that are not listed below `key`/ in their size."""
    sizes = {entry.key: entry.size for entry in store.list(f"{key}/")}
    return [file.path for file in files if sizes.get(f"{key}/{file.path}") != file.size]


def fetch(store: Store, key: str, files: Iterable[CommittedFile], folder: Path) -> bool:
    """Download files from `key`/ to `folder`; False if one is missing or differs."""
    wanted = list(files)
    try:
        get_files(store, [(f"{key}/{file.path}", folder / file.path) for file in wanted])
    except ObjectMissingError:
        return False
    return all(
        (folder / file.path).stat().st_size == file.size and _sha256(folder / file.path) == file.sha256
        for file in wanted
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
