"""What every store promises: whole objects, one winner, listings, the order of deletes."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.store import (
    Entry,
    ObjectMissingError,
    Store,
    check_writable,
    get_files,
    in_parallel,
    open_store,
)
from dsft_trainer.errors import TrainerError
from tests.s3_server import READER, S3Server


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_uri") if request.param == "s3" else (tmp_path / "run").as_uri()


@pytest.fixture
def store(uri: str) -> Store:
    return open_store(uri)


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
    assert len(list(pages.paginate(Bucket="dsft-tests", Prefix=store.root, PaginationConfig={"PageSize": 5}))) == 3
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
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        wins = list(pool.map(claim, [(store, writer) for writer in range(3)]))
    for turn in range(15):
        winners = [writer for writer in range(3) if wins[writer][turn]]
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
    in_parallel(lambda number: store.put_file(tmp_path / f"{number}.src", f"files/{number}"), range(20))
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


def test_writable_store_passes_and_keeps_no_probe(store: Store) -> None:
    check_writable(store)
    assert store.list() == []
