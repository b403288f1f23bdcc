"""A commit of another number of ranks: refused, or converted once, and whole or not read."""

import json
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint import universal
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from tests.trainer.group_starts import Converter, Start, contents, folders, of_two_ranks, steps

pytestmark = pytest.mark.usefixtures("process_group")


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
