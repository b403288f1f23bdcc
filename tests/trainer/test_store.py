"""What both stores promise (whole objects, one winner, order of deletes), and what they say when storage fails."""

import errno
import hashlib
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import pytest
from tests.s3_server import ADMIN, READER, S3Server

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.store import (
    Entry,
    ObjectMissingError,
    Store,
    check_writable,
    get_files,
    open_store,
    put_files,
)
from dsft_trainer.errors import TrainerError

MIB = 1024 * 1024
LARGE = 133 * MIB + 7


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("dsft-store")


@pytest.fixture
def s3_uri(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    return f"{bucket}/runs/{uuid4().hex}"


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_uri") if request.param == "s3" else (tmp_path / "run").as_uri()


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


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


# --- what every store promises


def test_round_trip(store: Store, tmp_path: Path) -> None:
    assert store.get_bytes("a/b.json") is None
    assert store.put_bytes("a/b.json", b"one")
    assert store.put_bytes("a/b.json", b"two")
    assert store.get_bytes("a/b.json") == b"two"
    source = tmp_path / "source.bin"
    source.write_bytes(b"\0\1" * 500)
    store.put_file(source, "a/deep/er/c.bin")
    store.get_file("a/deep/er/c.bin", tmp_path / "new" / "folder" / "c.bin")
    assert (tmp_path / "new" / "folder" / "c.bin").read_bytes() == b"\0\1" * 500
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["c.bin"]
    assert store.put_bytes("empty", b"")
    assert store.get_bytes("empty") == b""


def test_missing_object_names_its_place(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError) as raised:
        store.get_file("no/such.bin", tmp_path / "x")
    assert f"{store.uri}/no/such.bin" in raised.value.message
    assert not (tmp_path / "x").exists()


def test_list_is_recursive_sorted_and_by_folder(store: Store) -> None:
    keys = ["checkpoints/step-1/a.pt", "checkpoints/step-1/COMMIT.json", "checkpoints-old/x", "run.json", "a-b", "a/c"]
    for key in keys:
        store.put_bytes(key, key.encode())
    assert store.list() == [Entry(key, len(key)) for key in sorted(keys)]
    assert [entry.key for entry in store.list("checkpoints/")] == sorted(keys[:2])
    assert store.list("checkpoints") == store.list("checkpoints/")
    assert store.list("nothing/") == []


def test_list_beyond_one_page(s3_uri: str) -> None:
    store = open_store(s3_uri)
    client = store._client()  # pyright: ignore
    pages = client.get_paginator("list_objects_v2")
    for number in range(12):
        store.put_bytes(f"k{number:02}", b"")
    assert len(list(pages.paginate(Bucket="dsft-store", Prefix=store.root, PaginationConfig={"PageSize": 5}))) == 3
    client.meta.events.register("provide-client-params.s3.ListObjectsV2", lambda params, **_: params | {"MaxKeys": 5})
    assert [entry.key for entry in store.list()] == [f"k{number:02}" for number in range(12)]


def test_delete_ignores_missing_keys_and_leaves_the_rest(store: Store) -> None:
    for key in ("c/COMMIT.json", "c/a", "c/b", "d/a"):
        store.put_bytes(key, b"x")
    store.delete(["c/COMMIT.json", "c/a", "c/none", "none/at/all", "c/b"])
    assert [entry.key for entry in store.list()] == ["d/a"]
    store.delete([])


def test_file_store_removes_empty_folders(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put_bytes("checkpoints/step-1/deep/a", b"x")
    store.put_bytes("checkpoints/step-2/a", b"x")
    store.delete(["checkpoints/step-1/deep/a"])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2"]
    store.delete(["checkpoints/step-2/a"])
    assert not (tmp_path / "checkpoints").exists()
    assert tmp_path.exists()


def test_commit_is_deleted_after_what_precedes_it_and_before_what_follows(s3_uri: str) -> None:
    """Seen from the requests on the wire, as they are answered."""
    store = open_store(s3_uri)
    order: list[str] = []
    store._client().meta.events.register(  # pyright: ignore
        "before-send.s3.DeleteObject", lambda request, **_: order.append(request.url.rpartition("/")[2])
    )
    shards = [f"c1/shard-{number}" for number in range(20)]
    store.delete(["c1/COMMIT.json", *shards, "c2/COMMIT.json", "c2/z"])
    assert order[0] == "COMMIT.json"
    assert sorted(order[1:21]) == sorted(shard.rpartition("/")[2] for shard in shards)
    assert order[21:] == ["COMMIT.json", "z"]


def test_failed_delete_of_commit_keeps_the_shards(s3_uri: str, s3_server: S3Server, monkeypatch) -> None:
    open_store(s3_uri).put_bytes("c/COMMIT.json", b"{}")
    open_store(s3_uri).put_bytes("c/shard", b"x")
    for name, value in s3_server.env(READER).items():
        monkeypatch.setenv(name, value)
    reader = open_store(s3_uri)
    with pytest.raises(TrainerError, match=r"c/COMMIT\.json.*AccessDenied"):
        reader.delete(["c/COMMIT.json", "c/shard"])
    assert [entry.key for entry in reader.list()] == ["c/COMMIT.json", "c/shard"]


def claim(arguments: tuple[Store, int]) -> list[bool]:
    store, writer = arguments
    return [store.put_bytes(f"race/{turn}/claim.json", b"%d" % writer, if_absent=True) for turn in range(15)]


def test_if_absent_has_one_winner_among_processes(store: Store) -> None:
    """Stores travel by pickle, also used ones; each process then has a connection of its own."""
    assert store.get_bytes("warm") is None
    with ProcessPoolExecutor(4, mp_context=get_context("forkserver")) as pool:
        wins = list(pool.map(claim, [(store, writer) for writer in range(4)]))
    for turn in range(15):
        winners = [writer for writer in range(4) if wins[writer][turn]]
        assert len(winners) == 1, f"turn {turn} was won by {winners}"
        assert store.get_bytes(f"race/{turn}/claim.json") == b"%d" % winners[0]


def test_used_store_works_after_fork(store: Store) -> None:
    store.put_bytes("parent", b"x")
    child = os.fork()
    if not child:
        os._exit(0 if store.put_bytes("child", b"y") and store.get_bytes("parent") == b"x" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get_bytes("child") == b"y"


def test_writers_and_a_deleter_in_one_folder(store: Store) -> None:
    """A folder that becomes empty vanishes under a writer's hands; the write still succeeds."""
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for turn in range(40):
                store.put_bytes(f"shared/folder/{name}", b"%d" % turn)
                assert store.get_bytes(f"shared/folder/{name}") == b"%d" % turn
                store.delete([f"shared/folder/{name}"])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.list() == []


def test_many_files_at_once(store: Store, tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.src").write_bytes(b"%d" % number * 1000)
    put_files(store, [(tmp_path / f"{number}.src", f"files/{number}") for number in range(20)])
    get_files(store, [(f"files/{number}", tmp_path / "back" / str(number)) for number in range(20)])
    for number in range(20):
        assert (tmp_path / "back" / str(number)).read_bytes() == b"%d" % number * 1000
    with pytest.raises(ObjectMissingError, match="files/none"):
        get_files(store, [("files/1", tmp_path / "1"), ("files/none", tmp_path / "2")])


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\0b", "a/"])
def test_keys_stay_below_the_root(store: Store, key: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="is not a relative path"):
        store.get_file(key, tmp_path / "x")
    with pytest.raises(TrainerError, match="is not a relative path"):
        store.put_bytes(key, b"x")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("gs://bucket/x", "unknown scheme 'gs'"),
        ("runs/x", "unknown scheme ''"),
        ("file://relative/x", "malformed"),
        ("file:///", "malformed"),
        ("s3:///x", "malformed"),
        ("s3://bucket/x?endpoint_override=http://h:1", "malformed"),
    ],
)
def test_bad_uri_names_the_known_ones(uri: str, message: str) -> None:
    with pytest.raises(TrainerError, match=message) as raised:
        open_store(uri)
    assert raised.value.failure_class is FailureClass.CONFIG_INVALID
    assert uri in raised.value.message
    assert "s3://BUCKET/PREFIX" in raised.value.remedy
    assert "file:///FOLDER" in raised.value.remedy


# --- large files, and processes and servers that die


def test_large_file_goes_in_parts(s3_uri: str, large_file: Path, tmp_path: Path, s3_server: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_file(large_file, "large.bin")
    head = s3_server.client().head_object(Bucket="dsft-store", Key=f"{s3_uri.partition('dsft-store/')[2]}/large.bin")
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


def test_every_call_outlasts_the_server(s3_uri: str, tmp_path: Path, mortal: S3Server) -> None:
    store = open_store(s3_uri)
    store.put_bytes("before", b"x")
    mortal.kill()
    starter = threading.Thread(target=mortal.restart)
    starter.start()
    assert store.put_bytes("claim", b"mine", if_absent=True)
    assert store.get_bytes("before") == b"x"
    store.get_file("claim", tmp_path / "claim")
    store.delete(["before"])
    assert [entry.key for entry in store.list()] == ["claim"]
    starter.join(60)


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


def test_store_pickles_without_its_connection(s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.put_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri == s3_uri
    assert copy.get_bytes("a") == b"1"


# --- the check before a run, and what it says


def denied(store: Store, *, within: float = 5.0) -> TrainerError:
    started = time.monotonic()
    with pytest.raises(TrainerError) as raised:
        check_writable(store)
    assert time.monotonic() - started < within
    assert raised.value.failure_class is FailureClass.STORAGE_DENIED
    assert store.uri in raised.value.message
    for secret in (ADMIN.secret_key, READER.secret_key, "not-the-secret"):
        assert secret not in str(raised.value)
    return raised.value


def test_writable_store_passes_and_keeps_no_probe(store: Store) -> None:
    check_writable(store)
    assert store.list() == []


@pytest.mark.parametrize(
    ("variables", "message", "remedy"),
    [
        (READER, "AccessDenied", "s3:PutObject"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, "no complete credentials", "AWS_ACCESS_KEY_ID"),
    ],
)
def test_refused_credentials(
    s3_uri: str, s3_server: S3Server, monkeypatch, variables, message: str, remedy: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name, value in (s3_server.env(variables) if variables is READER else variables).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    error = denied(open_store(s3_uri))
    assert message in error.message
    assert s3_server.endpoint in error.message
    assert remedy in error.remedy


def test_missing_bucket(s3_uri: str) -> None:
    error = denied(open_store("s3://no-such-bucket/runs"))
    assert "NoSuchBucket" in error.message
    assert "create the bucket" in error.remedy


def test_endpoint_that_refuses_connections(s3_uri: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = denied(open_store(s3_uri, endpoint_url=f"http://user:not-the-secret@127.0.0.1:{port}"), within=10)
    assert f"http://127.0.0.1:{port}" in error.message
    assert "Connection refused" in error.message
    assert "spec.storage.endpointUrl" in error.remedy


def test_endpoint_that_never_answers(s3_uri: str) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(16)
        error = denied(open_store(s3_uri, endpoint_url=f"http://127.0.0.1:{mute.getsockname()[1]}"), within=20)
    assert "ReadTimeoutError" in error.message


def test_outage_longer_than_the_window_is_worth_a_new_attempt(s3_uri: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(TrainerError, match="Connection refused") as raised:
            open_store(s3_uri, endpoint_url=endpoint, retry_seconds=0.5).get_bytes("x")
    assert raised.value.failure_class is FailureClass.UNKNOWN


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for uri in ((tmp_path / "file").as_uri(), (tmp_path / "file" / "below").as_uri()):
        error = denied(open_store(uri))
        assert os.strerror(errno.ENOTDIR) in error.message
        assert "spec.storage.uri" in error.remedy


CHECK = """
import sys
from dsft_trainer.checkpoint.store import check_writable, open_store
from dsft_trainer.errors import TrainerError
store = open_store(sys.argv[1])
try:
    check_writable(store)
    store.put_bytes("large", bytes(4 << 20))
except TrainerError as error:
    sys.exit(f"{error.failure_class} {error.message} ({error.remedy}) {[entry.key for entry in store.list()]}")
"""


@pytest.mark.parametrize(
    ("option", "message", "remedy"),
    [
        ("size=1m", "No space left on device", "free space"),
        ("ro", "Read-only file system", "mount the volume read-write"),
    ],
)
def test_full_and_read_only_volumes(tmp_path: Path, option: str, message: str, remedy: str) -> None:
    """On a real file system of its own, in a namespace of its own."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mount, "mount -t tmpfs none /mnt"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount in a user namespace")
    script = 'mount -t tmpfs -o "$0" none "$1" && exec "$2" -c "$3" "file://$1"'
    done = subprocess.run(
        [*mount, script, option, str(tmp_path), sys.executable, CHECK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("StorageDenied "), done.stderr
    assert tmp_path.as_uri() in done.stderr
    assert message in done.stderr
    assert remedy in done.stderr
    assert done.stderr.rstrip().endswith("[]"), "nothing half-written is listed"
