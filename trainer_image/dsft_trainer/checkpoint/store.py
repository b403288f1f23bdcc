"""One run's folder in durable storage, as a small set of objects under keys: S3 or a file system.

Both stores give the same promises, on which the checkpoint protocol rests: an object is visible whole or not at
all, `if_absent` has one winner, and deletes keep their order around COMMIT.json.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol, Self, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_trainer.errors import TrainerError

COMMIT = "COMMIT.json"
"""Name of the object that makes a checkpoint valid: stores never delete a later key before it is gone."""

# Small files wait for answers, not for bandwidth; with more than these, Python's threads wait for one another.
PARALLEL_FILES = 16

SMALL_BYTES = 8 * 1024 * 1024
"""Files below this cost by their number rather than by their size."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """An object: its key relative to the store's root, '/'-separated, and its size in bytes.

    `etag` changes when the content does; None where the store has none.
    """

    key: str
    size: int
    etag: str | None = field(default=None, compare=False)


class ObjectMissingError(TrainerError):
    """There is no object under this key."""

    def __init__(self, place: str) -> None:
        super().__init__(FailureClass.UNKNOWN, f"{place} does not exist", "check that nothing else deletes files there")


class Store(Protocol):
    """Objects under keys. Thread-safe, and usable after pickling and fork.

    Raises TrainerError: STORAGE_DENIED at once when only a person can help (bucket, credentials, full disk), UNKNOWN
    when the storage failed for longer than the store waits.
    """

    uri: str
    """URI of the root folder, without a slash at its end."""

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object, whole or not at all. False, with nothing written, only if `if_absent` and the key exists.

        Writers that race with `if_absent` must write different data: after a lost reply the data tells who won.
        """
        ...

    def get_bytes(self, key: str, *, first: int | None = None) -> bytes | None:
        """Read an object, or its first so many bytes; None if there is none."""
        ...

    def put_file(self, path: Path, key: str) -> None:
        """Write a file's content, whole or not at all. It may be moved: do not use `path` afterwards."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Write an object to `path`, whole or not at all; folders are made. Raises ObjectMissingError."""
        ...

    def folders(self) -> list[str]:
        """Names of the folders directly below the root, sorted; what is in them is not looked at."""
        ...

    def list(self, prefix: str = "") -> list[Entry]:
        """All objects below the folder `prefix`, sorted by key."""
        ...

    def entry(self, key: str) -> Entry | None:
        """One object, without its content; None if there is none."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine. Nothing that follows a COMMIT.json goes before it, crash or not."""
        ...

    def impatient(self) -> Self:
        """The same store, giving up in seconds."""
        ...


def store_of(job: Job) -> Store:
    """The run's own folder, as `open_store` gives it."""
    storage = job.spec.storage
    return open_store(job.storage_prefix, endpoint_url=storage.endpoint_url, region=storage.region)


def open_store(
    uri: str, *, endpoint_url: str | None = None, region: str | None = None, retry_seconds: float = 60.0
) -> Store:
    """The store whose root is `uri`: file:///FOLDER or s3://BUCKET/PREFIX. Nothing is contacted yet.

    S3 takes credentials, and what is not given here, from the environment (AWS_*). `retry_seconds` is for how long
    a failing S3 request is tried again before its call fails.
    """
    # Each store is imported only when used: boto3 takes a noticeable part of a second.
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.strip("/"):
        from dsft_trainer.checkpoint.store_file import FileStore

        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not parts.query and not parts.fragment:
        from dsft_trainer.checkpoint.store_s3 import S3Store

        return S3Store(
            parts.netloc,
            parts.path.strip("/"),
            endpoint_url=endpoint_url,
            region=region,
            retry_seconds=retry_seconds,
        )
    known = "s3://BUCKET/PREFIX (with spec.storage.endpointUrl) or file:///FOLDER"
    fault = "is malformed" if parts.scheme in ("file", "s3") else f"has the unknown scheme {parts.scheme!r}"
    raise TrainerError(FailureClass.CONFIG_INVALID, f"storage URI {uri!r} {fault}", f"write it as {known}")


def check_writable(store: Store, *, worked_before: bool = False) -> None:
    """Write, read, list and delete a probe; returns within seconds even when nothing answers.

    With `worked_before` silence is an outage: it is waited out as by any other request, and is no StorageDenied, which would be
    the end of the run.

    Raises TrainerError(STORAGE_DENIED) that names the URI, what failed and what to do.
    """
    probed = store if worked_before else store.impatient()
    key, data = f".probe/{uuid4().hex}", b"dsft checks that it may write here\n"
    try:
        won = probed.put_bytes(key, data, if_absent=True)
        lost = probed.put_bytes(key, b"a second writer", if_absent=True)
        read = probed.get_bytes(key)
        listed = [entry.key for entry in probed.list(".probe/")]
        probed.delete([key])
        left = probed.get_bytes(key)
    except TrainerError as error:
        if worked_before:
            raise
        raise TrainerError(FailureClass.STORAGE_DENIED, error.message, error.remedy) from error
    if not won or lost:
        fault = "ignores conditional writes (If-None-Match), so two attempts could overwrite each other"
    elif read != data:
        fault = "did not return what was just written"
    elif key not in listed:
        fault = "does not list what was just written"
    elif left is not None:
        fault = "still returns what was just deleted"
    else:
        return
    raise TrainerError(FailureClass.STORAGE_DENIED, f"{store.uri} {fault}", "use a strongly consistent storage server")


def get_files(store: Store, files: Iterable[tuple[str, Path]]) -> None:
    """`get_file` several (key, path) at a time. The first error wins."""
    in_parallel(lambda file: store.get_file(*file), files)


def in_parallel(transfer: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Transfer several at a time; the results in the order of the items. The first error wins, and nothing more is begun."""
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="store") as pool:
        futures = [pool.submit(transfer, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]


def check_key(key: str) -> str:
    """The key itself, if it stays below a store's root. Keys may come from a manifest, so from another run."""
    if not key or "\0" in key or key != str(PurePosixPath(key)) or key.startswith("/") or ".." in key.split("/"):
        raise TrainerError(FailureClass.CONFIG_INVALID, f"storage key {key!r} is not a relative path", "correct it")
    return key
