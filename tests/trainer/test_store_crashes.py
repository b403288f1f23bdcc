"""Large files, and servers, uploaders and writers that are killed: whole objects or none, and calls that outlast it."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from uuid import uuid4

import pytest

from dsft_trainer.checkpoint.store import (
    open_store,
)
from dsft_trainer.errors import TrainerError
from tests.s3_server import S3Server

MIB = 1024 * 1024
LARGE = 133 * MIB + 7


@pytest.fixture
def mortal(s3_server: S3Server) -> Iterator[S3Server]:
    """The S3 server, for a test that kills it."""
    yield s3_server
    if s3_server.process is None or s3_server.process.poll() is not None:
        s3_server.restart()


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """No two of its MiB are equal, so parts in the wrong order would show."""
    block = os.urandom(MIB - 8)
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        for number in range(LARGE // MIB):
            file.write(number.to_bytes(8) + block)
        file.write(b"the end")
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_until(fact: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        threading.Event().wait(0.01)


def run_python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": paths})


def test_large_file_goes_in_parts(s3_uri: str, large_file: Path, tmp_path: Path, s3_server: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_file(large_file, "large.bin")
    head = s3_server.client().head_object(Bucket="dsft-tests", Key=f"{s3_uri.partition('dsft-tests/')[2]}/large.bin")
    assert head["ETag"].strip('"').endswith("-3"), f"ETag {head['ETag']} is not that of three parts"
    store.get_file("large.bin", tmp_path / "back.bin")
    assert digest(tmp_path / "back.bin") == digest(large_file)


def test_large_file_between_file_systems(large_file: Path, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"dsft-test-{uuid4().hex}"
    if not elsewhere.parent.is_dir() or elsewhere.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as a second file system")
    store = open_store((tmp_path / "run").as_uri())
    expected = digest(large_file)
    try:
        shutil.copyfile(large_file, elsewhere)
        store.put_file(elsewhere, "copied.bin")
    finally:
        elsewhere.unlink(missing_ok=True)
    store.put_file(large_file, "moved.bin")
    assert digest(tmp_path / "run" / "copied.bin") == digest(tmp_path / "run" / "moved.bin") == expected
    assert not large_file.exists()
    assert [entry.key for entry in store.list()] == ["copied.bin", "moved.bin"]


def test_upload_outlasts_the_server(s3_uri: str, large_file: Path, tmp_path: Path, mortal: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_bytes("before", b"x")
    before, failures = mortal.stored_bytes(), []

    def upload() -> None:
        try:
            store.put_file(large_file, "large.bin")
        except TrainerError as error:
            failures.append(error)

    thread = threading.Thread(target=upload)
    thread.start()
    wait_until(lambda: mortal.stored_bytes() > before + 8 * MIB, "some of the file has arrived")
    mortal.kill()
    assert thread.is_alive(), "the upload ended before the server was killed"
    mortal.restart()
    thread.join(60)
    assert not thread.is_alive()
    assert failures == []
    store.get_file("large.bin", tmp_path / "back.bin")
    assert digest(tmp_path / "back.bin") == digest(large_file)
    assert [entry.key for entry in store.list()] == ["before", "large.bin"]


def test_download_outlasts_the_server(s3_uri: str, large_file: Path, tmp_path: Path, mortal: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_file(large_file, "large.bin")
    folder = tmp_path / "back"
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(store.get_file, "large.bin", folder / "large.bin")
        wait_until(lambda: any(path.stat().st_blocks for path in folder.glob("*")), "some of the file has arrived")
        mortal.kill()
        assert not download.done(), "the download ended before the server was killed"
        assert not (folder / "large.bin").exists(), "half a file is at its destination"
        mortal.restart()
    download.result()
    assert digest(folder / "large.bin") == digest(large_file)
    assert [path.name for path in folder.iterdir()] == ["large.bin"]


def test_every_call_outlasts_the_server(s3_uri: str, tmp_path: Path, mortal: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_bytes("before", b"x")
    store.put_bytes("doomed", b"x")
    mortal.kill()
    with ThreadPoolExecutor(5) as pool:
        claimed = pool.submit(store.put_bytes, "claim", b"mine", if_absent=True)
        read = pool.submit(store.get_bytes, "before")
        listed = pool.submit(store.list)
        fetched = pool.submit(store.get_file, "before", tmp_path / "before")
        deleted = pool.submit(store.delete, ["doomed"])
        done, _ = wait([claimed, read, listed, fetched, deleted], timeout=1)
        assert not done, "a call returned while the server was down"
        mortal.restart()
    assert claimed.result() is True
    assert read.result() == b"x"
    assert "before" in [entry.key for entry in listed.result()]
    fetched.result()
    deleted.result()
    assert (tmp_path / "before").read_bytes() == b"x"
    assert [entry.key for entry in store.list()] == ["before", "claim"]


UPLOAD = """
import sys
from pathlib import Path
from dsft_trainer.checkpoint.store import open_store
open_store(sys.argv[1]).put_file(Path(sys.argv[2]), "large.bin")
"""


def test_killed_uploader_leaves_nothing_visible(s3_uri: str, large_file: Path, s3_server: S3Server) -> None:
    before = s3_server.stored_bytes()
    uploader = run_python(UPLOAD, s3_uri, str(large_file))
    wait_until(lambda: s3_server.stored_bytes() > before + 8 * MIB, "some of the file has arrived")
    uploader.kill()
    assert uploader.wait(10) == -signal.SIGKILL
    store = open_store(s3_uri)
    assert store.list() == []
    assert store.get_bytes("large.bin") is None


WRITE = """
import sys
from dsft_trainer.checkpoint.store import open_store
open_store(sys.argv[1]).put_bytes("large.bin", bytes(400 << 20), if_absent=sys.argv[2] == "True")
"""


@pytest.mark.parametrize("if_absent", [False, True])
def test_killed_writer_leaves_nothing_visible(tmp_path: Path, if_absent: bool) -> None:
    root = tmp_path / "run"
    writer = run_python(WRITE, root.as_uri(), str(if_absent))
    wait_until(lambda: any(path.stat().st_size for path in (root / ".tmp").glob("*")), "the write has begun")
    writer.kill()
    assert writer.wait(10) == -signal.SIGKILL
    (stray,) = (root / ".tmp").iterdir()
    store = open_store(root.as_uri())
    assert store.list() == []
    assert store.get_bytes("large.bin") is None
    assert store.put_bytes("large.bin", b"whole", if_absent=True)
    assert stray.exists(), "what may have a living writer stays"
    os.utime(stray, (0, 0))
    open_store(root.as_uri()).put_bytes("next", b"x")
    assert not stray.exists(), "a stray of long ago is removed"


class LostReply:
    """Loses the reply to the first request, after the server has done its work."""

    def __init__(self) -> None:
        self.lost = 0

    def __call__(self, *, response, **_: object) -> float | None:
        if self.lost or response is None:
            return None
        self.lost += 1
        return 0.0


@pytest.mark.parametrize(("there", "won"), [(None, True), (b"theirs", False)])
def test_claim_whose_reply_was_lost_is_still_won_by_its_writer(s3_uri: str, there: bytes | None, won: bool) -> None:
    store = open_store(s3_uri)
    if there:
        store.put_bytes("claim", there)
    lost = LostReply()
    store._client().meta.events.register_first("needs-retry.s3.PutObject", lost)  # pyright: ignore
    assert store.put_bytes("claim", b"mine", if_absent=True) is won
    assert lost.lost == 1
    assert store.get_bytes("claim") == (there or b"mine")
