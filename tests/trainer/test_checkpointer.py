"""The checkpoint protocol on one rank: what a start finds, what it sweeps, what it refuses, and what is retired."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.status import MAX_RETAINED
from dsft_trainer.checkpoint import files, universal
from dsft_trainer.checkpoint.checkpointer import Checkpointer, Identity, Point
from dsft_trainer.checkpoint.commits import Patience
from dsft_trainer.checkpoint.listing import Retention, read_commits
from dsft_trainer.checkpoint.origin import Origin
from dsft_trainer.checkpoint.restore import Convert, Restorer
from dsft_trainer.checkpoint.store import Store, get_files, open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Place

pytestmark = pytest.mark.usefixtures("process_group")

KEEP_TEN = Retention(keep_last=10, keep_best=0, metric="loss", larger_is_better=False)


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(request.getfixturevalue("s3_uri") if request.param == "s3" else (tmp_path / "run").as_uri())


class State:
    """One rank's state: a large file and a small one in a folder below, as DeepSpeed writes them."""

    def __init__(self) -> None:
        self.value = ""

    def stage(self, folder: Path, tag: str) -> "Copied":
        return Copied(self.value)

    def load(self, folder: Path, tag: str) -> None:
        self.value = (folder / tag / "zero" / "optimizer.pt").read_text()
        assert (folder / tag / "model.pt").read_text() == self.value * 1000

    def load_universal(self, folder: Path, tag: str) -> None:
        self.value = (folder / tag / "zero" / "whole.pt").read_text()

    def load_weights(self, folder: Path, tag: str) -> None:
        self.load_universal(folder, tag)
        self.value = f"weights of {self.value}"


class Copied:
    """The state as it was."""

    def __init__(self, value: str) -> None:
        self.value = value

    def write(self, folder: Path) -> None:
        (folder / "zero").mkdir(parents=True)
        (folder / "model.pt").write_text(self.value * 1000)
        (folder / "zero" / "optimizer.pt").write_text(self.value)


class Start:
    """One group start of a run."""

    def __init__(
        self,
        store: Store,
        scratch: Path,
        *,
        retention: Retention = KEEP_TEN,
        world_size: int = 1,
        convert: Convert | None = None,
        origin: Callable[[], Origin] | None = None,
    ) -> None:
        # Each start is another machine: it finds nothing of the one before.
        shutil.rmtree(scratch, ignore_errors=True)
        place = Place(rank=0, world_size=world_size, local_rank=0)
        self.checkpointer = Checkpointer(
            store,
            place,
            scratch,
            Identity(spec_hash="sha256:0", zero_stage=3, precision="fp32", versions={"torch": "2"}),
            retention,
            Restorer(
                store,
                place,
                scratch,
                on_world_size_change="convert" if convert else "refuse",
                convert=convert or Converter(),
                origin=origin,
            ),
        )
        self.state = State()

    def begin(self, attempt: int) -> int:
        """Claim and load; the step to go on from."""
        self.checkpointer.begin(attempt)
        self.checkpointer.convert()
        self.checkpointer.load(self.state)
        return self.checkpointer.restorer.first_step

    def save(self, step: int, loss: float | None = None) -> str:
        """Commit a state that tells its step; the checkpoint's name. With a loss also what early stopping knows."""
        self.state.value = f"step {step} of {self.checkpointer.claim}"
        metrics = {} if loss is None else {"loss": loss}
        patience = None if loss is None else Patience(best=loss, without=0)
        point = Point(step, samples=8 * step, epoch=step / 10, metrics=metrics, patience=patience)
        self.checkpointer.start(self.state, point)
        outcome = self.checkpointer.settle()
        if isinstance(outcome, TrainerError):
            raise outcome
        return outcome.name


def folders(store: Store) -> set[str]:
    return {entry.key.split("/")[1] for entry in store.list("checkpoints")}


def steps(store: Store) -> list[int]:
    return [commit.step for commit in read_commits(store)]


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


class Converter:
    """Converts `State`'s files as DeepSpeed does its own, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        (target / "zero").mkdir(parents=True)
        (target / "zero" / "whole.pt").write_text((source / "zero" / "optimizer.pt").read_text())
        if self.error is not None:
            raise self.error


def of_two_ranks(store: Store, scratch: Path, *, steps: tuple[int, ...] = (3,)) -> list[str]:
    """Commits of a run, made to look as if two ranks had written them."""
    start = Start(store, scratch)
    start.begin(1)
    names = [start.save(step) for step in steps]
    for name in names:
        key = f"checkpoints/{name}/COMMIT.json"
        commit = {**json.loads(store.get_bytes(key) or b""), "worldSize": 2}
        store.put_bytes(key, json.dumps(commit).encode())
    return names


def contents(store: Store, folder: str) -> dict[str, bytes | None]:
    return {entry.key: store.get_bytes(entry.key) for entry in store.list(folder)}


def test_another_number_of_ranks_is_refused(store: Store, tmp_path: Path) -> None:
    (name,) = of_two_ranks(store, tmp_path / "scratch")
    before = contents(store, "")
    expected = (
        f"spec.checkpoint.onWorldSizeChange is refuse: checkpoint {name} was written by 2 ranks, and 1 would load it"
    )
    with pytest.raises(TrainerError, match=expected) as caught:
        Start(store, tmp_path / "scratch").begin(2)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
    assert "run with 2 ranks again (spec.nodePools, or --workers)" in caught.value.remedy
    # The refused start left no trace.
    assert contents(store, "") == before


def test_a_commit_of_other_ranks_is_converted_once(store: Store, tmp_path: Path) -> None:
    (name,) = of_two_ranks(store, tmp_path / "scratch")
    before = contents(store, f"checkpoints/{name}")
    convert = Converter()
    for attempt in (2, 3):
        # The second one dies before its first save, and the third finds the conversion.
        start = Start(store, tmp_path / "scratch", convert=convert)
        assert start.begin(attempt) == 3
        assert start.state.value == "step 3 of a1.g1"
        assert contents(store, f"checkpoints/{name}") == before
        assert convert.calls == 1
        assert [entry.key for entry in store.list("universal")] == [
            "universal/a2.g1/COMMIT.json",
            "universal/a2.g1/zero/whole.pt",
        ]
        assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
    start.save(6)
    assert store.list("universal") == []
    assert steps(store) == [3, 6]
    assert Start(store, tmp_path / "scratch", convert=convert).begin(4) == 6
    assert convert.calls == 1


def test_a_conversion_that_failed_says_so_and_is_done_again(store: Store, tmp_path: Path) -> None:
    (name,) = of_two_ranks(store, tmp_path / "scratch")
    expected = f"checkpoint {name} of 2 ranks was not converted for 1: no space left"
    with pytest.raises(TrainerError, match=expected):
        Start(store, tmp_path / "scratch", convert=Converter(OSError(28, "disk full"))).begin(2)
    assert store.list("universal") == []
    convert = Converter()
    assert Start(store, tmp_path / "scratch", convert=convert).begin(3) == 3
    assert convert.calls == 1


@pytest.mark.parametrize("damage", ["no COMMIT.json", "half a COMMIT.json", "changed", "missing", "of another commit"])
def test_a_conversion_that_is_not_whole_is_not_read(store: Store, tmp_path: Path, damage: str) -> None:
    of_two_ranks(store, tmp_path / "scratch")
    Start(store, tmp_path / "scratch", convert=Converter()).begin(2)
    commit, data = "universal/a2.g1/COMMIT.json", "universal/a2.g1/zero/whole.pt"
    text = store.get_bytes(commit) or b""
    match damage:
        case "no COMMIT.json":
            store.delete([commit])
        case "half a COMMIT.json":
            store.put_bytes(commit, text[:50])
        case "changed":
            store.put_bytes(data, b"step 3 of a1.g2")
        case "missing":
            store.delete([data])
        case _:
            # The folder of a checkpoint is written once; a name alone would still prove nothing.
            digest = json.loads(text)["sourceDigest"]
            store.put_bytes(commit, text.replace(digest.encode(), digest[::-1].encode()))
            store.put_bytes(data, b"step 3 of another run")
    convert = Converter()
    start = Start(store, tmp_path / "scratch", convert=convert)
    assert start.begin(3) == 3
    assert start.state.value == "step 3 of a1.g1"
    assert convert.calls == 1
    assert {entry.key.split("/")[1] for entry in store.list("universal")} == {"a3.g1"}


def test_a_damaged_commit_of_other_ranks_means_the_one_before(store: Store, tmp_path: Path) -> None:
    first, second = of_two_ranks(store, tmp_path / "scratch", steps=(3, 6))
    store.put_bytes(f"checkpoints/{second}/model.pt", b"?")
    start = Start(store, tmp_path / "scratch", convert=Converter())
    assert start.begin(2) == 3
    assert start.state.value == "step 3 of a1.g1"
    assert steps(store) == [3]
    assert folders(store) == {first, second}
    conversion = universal.find(store, read_commits(store)[0])
    assert conversion is not None
    assert conversion.source == first
