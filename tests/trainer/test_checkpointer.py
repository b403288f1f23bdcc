"""The checkpoint protocol on one rank: what a start finds, what it sweeps, what it refuses, and what is retired."""

import json
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.status import MAX_RETAINED
from dsft_trainer.checkpoint import files
from dsft_trainer.checkpoint.listing import Retention, read_commits
from dsft_trainer.checkpoint.store import Store, get_files, open_store
from dsft_trainer.errors import TrainerError
from tests.trainer.group_starts import Start, folders, steps

pytestmark = pytest.mark.usefixtures("process_group")


def test_a_new_start_goes_on_from_the_newest_commit(store: Store, tmp_path: Path) -> None:
    first = Start(store, tmp_path / "scratch")
    assert first.begin(1) == 0
    first.save(3)
    name = first.save(6, loss=0.5)
    second = Start(store, tmp_path / "scratch")
    assert second.begin(1) == 6
    assert second.state.value == "step 6 of a1.g1"
    assert str(second.checkpointer.claim) == "a1.g2"
    base = second.checkpointer.restorer.base
    assert base is not None
    assert (base.name, base.samples, base.epoch, base.metrics) == (name, 48, 0.6, {"loss": 0.5})
    second.save(9)
    assert steps(store) == [3, 6, 9]


def test_nothing_is_left_on_the_node(store: Store, tmp_path: Path) -> None:
    for attempt in (1, 2):
        start = Start(store, tmp_path / "scratch")
        start.begin(attempt)
        start.save(3 * attempt)
        assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_a_start_sweeps_what_does_not_count(store: Store, tmp_path: Path) -> None:
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    kept = first.save(3)
    torn = first.save(6)
    store.delete([f"checkpoints/{torn}/COMMIT.json"])
    store.put_bytes("checkpoints/step-00000009-a1.g1/model.pt", b"half")
    assert Start(store, tmp_path / "scratch").begin(2) == 3
    assert folders(store) == {kept}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "larger_is_better", "expected"),
    [
        pytest.param(1, 0, False, [5], id="the last"),
        pytest.param(2, 0, False, [4, 5], id="the last two"),
        pytest.param(1, 1, False, [2, 5], id="the last and the smallest loss"),
        pytest.param(2, 1, True, [3, 4, 5], id="the last two and the largest score"),
    ],
)
def test_retention(
    store: Store, tmp_path: Path, keep_last: int, keep_best: int, larger_is_better: bool, expected: list[int]
) -> None:
    retention = Retention(keep_last, keep_best, "loss", larger_is_better)
    start = Start(store, tmp_path / "scratch", retention=retention)
    start.begin(1)
    for step, loss in enumerate([0.4, 0.1, 0.9, 0.3, 0.2], start=1):
        start.save(step, loss)
    assert steps(store) == expected
    assert [commit.step for commit in start.checkpointer.commits] == expected
    assert len(folders(store)) == len(expected)


def test_retention_goes_on_where_the_start_before_left_it(store: Store, tmp_path: Path) -> None:
    retention = Retention(keep_last=1, keep_best=1, metric="loss", larger_is_better=False)
    for attempt, losses in [(1, [0.1, 0.3]), (2, [0.4, 0.2])]:
        start = Start(store, tmp_path / "scratch", retention=retention)
        begun = start.begin(attempt)
        for step, loss in enumerate(losses, start=begun + 1):
            start.save(step, loss)
    assert steps(store) == [1, 4]


def test_what_could_not_be_let_go_goes_after_the_next_save(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Start(store, tmp_path / "scratch", retention=Retention(1, 0, "loss", larger_is_better=False))
    start.begin(1)
    start.save(1)
    checks: list[str] = []

    def away_after_the_commit() -> None:
        checks.append("asked")
        if len(checks) > 1:
            raise TrainerError(FailureClass.STORAGE_DENIED, "the claims cannot be listed")

    with monkeypatch.context() as patch:
        patch.setattr(start.checkpointer, "check_claim", away_after_the_commit)
        start.save(2)
    assert len(folders(store)) == 2
    name = start.save(3)
    assert folders(store) == {name}


def test_more_commits_than_a_status_holds_are_no_obstacle(tmp_path: Path) -> None:
    """They may not be deleted, say; each start goes on all the same, and tells of the newest."""
    store = open_store((tmp_path / "run").as_uri())
    start = Start(store, tmp_path / "scratch", retention=Retention(100, 0, "loss", larger_is_better=False))
    start.begin(1)
    for step in range(1, MAX_RETAINED + 3):
        start.save(step)
    again = Start(store, tmp_path / "scratch")
    assert again.begin(2) == MAX_RETAINED + 2
    told = again.checkpointer.references("s3://run").retained
    assert [ref.step for ref in told] == list(range(3, MAX_RETAINED + 3))


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing"])
def test_a_damaged_file_means_the_commit_before(store: Store, tmp_path: Path, damage: str) -> None:
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    whole = first.save(3)
    key = f"checkpoints/{first.save(6)}/zero/optimizer.pt"
    content = store.get_bytes(key)
    assert content is not None
    if damage == "missing":
        store.delete([key])
    else:
        store.put_bytes(key, content[:-1] if damage == "cut short" else content[:-1] + b"?")
    second = Start(store, tmp_path / "scratch")
    assert second.begin(2) == 3
    assert second.state.value == "step 3 of a1.g1"
    # It may be whole in storage, and this node's disk at fault: it stays until there is another one.
    assert folders(store) == {whole, "step-00000006-a1.g1"}
    assert steps(store) == [3]
    told = second.checkpointer.references("s3://run")
    assert told.damaged == ("step-00000006-a1.g1",)
    assert "passed over, since files do not match their checksums: step-00000006-a1.g1" in told.summary
    name = second.save(6)
    assert folders(store) == {whole, name}
    assert Start(store, tmp_path / "scratch").begin(3) == 6


def test_a_download_that_differs_is_made_once_more(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    first.save(3)
    downloads: list[int] = []

    def damaging(store: Store, pairs: list[tuple[str, Path]]) -> None:
        get_files(store, pairs)
        downloads.append(len(pairs))
        if len(downloads) == 1:
            pairs[0][1].write_text("flipped on the way")

    monkeypatch.setattr(files, "get_files", damaging)
    second = Start(store, tmp_path / "scratch")
    assert second.begin(2) == 3
    assert second.checkpointer.restorer.damaged == []
    assert downloads == [2, 1]


def test_commits_whose_claims_were_removed_count(store: Store, tmp_path: Path) -> None:
    """A rule of the bucket lets old objects expire: claims are older than the commits of a long attempt."""
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    names = {first.save(3), first.save(6)}
    store.delete([entry.key for entry in store.list("attempts")])
    second = Start(store, tmp_path / "scratch")
    assert second.begin(1) == 6
    assert str(second.checkpointer.claim) == "a1.g2"
    assert folders(store) == names


def test_when_no_commit_is_whole_training_begins_anew(store: Store, tmp_path: Path) -> None:
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    for step in (3, 6):
        store.put_bytes(f"checkpoints/{first.save(step)}/model.pt", b"?")
    second = Start(store, tmp_path / "scratch")
    assert second.begin(2) == 0
    assert second.checkpointer.restorer.base is None
    assert steps(store) == []
    name = second.save(3)
    assert folders(store) == {name}


@pytest.mark.parametrize("text", [b"", b"{", b'{"name": "step-00000006-a1.g1"}'], ids=["empty", "half", "incomplete"])
def test_a_damaged_commit_file_means_the_commit_before(store: Store, tmp_path: Path, text: bytes) -> None:
    first = Start(store, tmp_path / "scratch")
    first.begin(1)
    whole = first.save(3)
    store.put_bytes(f"checkpoints/{first.save(6)}/COMMIT.json", text)
    assert steps(store) == [3]
    second = Start(store, tmp_path / "scratch")
    assert second.begin(2) == 3
    assert folders(store) == {whole}


def test_a_superseded_start_stops_without_a_commit(store: Store, tmp_path: Path) -> None:
    zombie = Start(store, tmp_path / "zombie")
    zombie.begin(1)
    zombie.save(3)
    successor = Start(store, tmp_path / "scratch")
    assert successor.begin(2) == 3
    with pytest.raises(TrainerError, match=r"a2\.g1 has taken this run over from a1\.g1") as caught:
        zombie.save(6)
    assert caught.value.failure_class is FailureClass.HEAD_LOST
    assert steps(store) == [3]
    successor.save(6)
    assert steps(store) == [3, 6]
    # What the zombie uploaded goes with the next start.
    third = Start(store, tmp_path / "scratch")
    assert third.begin(3) == 6
    assert third.state.value == "step 6 of a2.g1"
    assert folders(store) == {"step-00000003-a1.g1", "step-00000006-a2.g1"}


def test_a_folder_that_somebody_emptied_is_told(store: Store, tmp_path: Path) -> None:
    start = Start(store, tmp_path / "scratch")
    start.begin(1)
    start.save(3)
    store.delete([entry.key for entry in store.list("")])
    with pytest.raises(
        TrainerError, match=r"the claim a1\.g1 of this start is gone from .*: somebody removed"
    ) as caught:
        start.save(6)
    assert caught.value.failure_class is FailureClass.UNKNOWN
    assert read_commits(store) == []


def test_a_zombie_that_commits_in_the_last_moment_is_not_read(store: Store, tmp_path: Path) -> None:
    zombie = Start(store, tmp_path / "zombie")
    zombie.begin(1)
    zombie.save(3)
    # The successor chose its base before this commit, and claimed after it.
    claim = json.loads(store.get_bytes("attempts/a1.g1.json") or b"")
    late = {**claim, "id": {"attempt": 2, "group": 1}, "base": "step-00000003-a1.g1", "baseStep": 3, "nonce": "2"}
    zombie.save(6)
    store.put_bytes("attempts/a2.g1.json", json.dumps(late).encode())
    assert steps(store) == [3]
    third = Start(store, tmp_path / "scratch")
    assert third.begin(3) == 3
    assert folders(store) == {"step-00000003-a1.g1"}


def test_a_zombie_whose_commit_was_on_its_way_lets_nothing_go(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the zombie step 9 is the best, so it would let step 3 go, which is its successor's best."""
    retention = Retention(1, 1, "loss", larger_is_better=False)
    zombie = Start(store, tmp_path / "zombie", retention=retention)
    zombie.begin(1)
    zombie.save(3, loss=0.5)
    zombie.save(6, loss=0.9)
    successor = Start(store, tmp_path / "scratch", retention=retention)
    put_bytes = store.put_bytes

    def put_after_the_thaw(key: str, data: bytes, **condition: bool) -> bool:
        if key == "checkpoints/step-00000009-a1.g1/COMMIT.json":
            assert successor.begin(2) == 6
            successor.save(9, loss=0.7)
        return put_bytes(key, data, **condition)

    monkeypatch.setattr(store, "put_bytes", put_after_the_thaw)
    with pytest.raises(TrainerError, match=r"a2\.g1 has taken this run over from a1\.g1"):
        zombie.save(9, loss=0.1)
    assert {"step-00000009-a1.g1", "step-00000009-a2.g1"} <= folders(store)
    assert [commit.name for commit in read_commits(store)] == ["step-00000003-a1.g1", "step-00000009-a2.g1"]


def test_ranks_that_a_superseded_attempt_starts_again_end_at_once(store: Store, tmp_path: Path) -> None:
    Start(store, tmp_path / "scratch").begin(2)
    with pytest.raises(TrainerError, match=r"a2\.g1 has taken this run over from a1\.g1"):
        Start(store, tmp_path / "zombie").begin(1)


@pytest.mark.parametrize("folder", ["checkpoints/step-00000009-a5.g1", "universal/a5.g1"])
def test_a_start_that_froze_after_its_claim_sweeps_nothing_of_its_successors(
    store: Store, tmp_path: Path, folder: str
) -> None:
    store.put_bytes(f"{folder}/model.pt", b"on its way")
    Start(store, tmp_path / "scratch").begin(2)
    assert [entry.key for entry in store.list(folder)] == [f"{folder}/model.pt"]
