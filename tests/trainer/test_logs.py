"""The log of a process is in storage while it runs, and whole when it ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_trainer import logs
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.logs import LogShipper, keep_last_lines, log_name
from dsft_trainer.progress import starting
from tests.trainer.runs import wait_until
from tests.trainer.test_private_ray import JOB

KEY = "logs/attempt-1/driver.log"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "run").as_uri())


def test_it_follows_its_files_and_comes_back_for_the_last_line(store: Store, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("one\n")
    err.write_text("two\n")
    with LogShipper(store, KEY, (out, err), seconds=0.02):
        wait_until(lambda: store.get_bytes(KEY) == b"one\ntwo\n", "the first lines are in storage", 30)
        out.write_text("one\nthree\n")
        wait_until(lambda: store.get_bytes(KEY) == b"one\nthree\ntwo\n", "the next line is in storage", 30)
        err.write_text("two\nthe last\n")
    assert store.get_bytes(KEY) == b"one\nthree\ntwo\nthe last\n"


def test_of_a_long_log_it_keeps_the_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "TAIL_BYTES", 100)
    out = tmp_path / "out"
    out.write_text("".join(f"line {number}\n" for number in range(1000)))
    with LogShipper(store, KEY, (out,)):
        pass
    kept = (store.get_bytes(KEY) or b"").decode().splitlines()
    assert kept[0] == "[the beginning is left out]"
    assert kept[-1] == "line 999"
    assert all(line.startswith("line ") for line in kept[1:])
    assert len("\n".join(kept[1:])) <= 100


def test_what_cannot_be_written_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a folder should be")
    with LogShipper(open_store((tmp_path / "run").as_uri()), KEY, (tmp_path / "none",), seconds=0.01):
        pass


def test_a_process_finds_the_files_it_prints_to(tmp_path: Path) -> None:
    script = "from dsft_trainer.logs import output_files; print(*output_files(), sep='\\n')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, stderr=subprocess.STDOUT, check=True)
    assert (tmp_path / "out").read_text().splitlines() == [str(tmp_path / "out")]
    piped = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert piped.stdout.strip() == b""


def test_of_a_process_that_failed_the_last_lines_are_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    out.write_text("".join(f"line {number}\n" for number in range(1000)))
    err.write_text("the end")
    where = keep_last_lines(JOB.model_copy(update={"storage_prefix": store.uri}), "rank-1-start-2", (out, err))
    assert where == f"{store.uri}/logs/attempt-1/last-lines-rank-1-start-2.txt"
    kept = (store.get_bytes("logs/attempt-1/last-lines-rank-1-start-2.txt") or b"").decode().splitlines()
    assert kept == [*(f"line {number}" for number in range(950, 1000)), "the end"]

    def gone(_: object) -> Store:
        raise TrainerError(FailureClass.UNKNOWN, "storage is gone")

    monkeypatch.setattr(logs, "store_of", gone)
    assert keep_last_lines(JOB, "rank-1", (out,)) is None


def test_each_start_of_a_rank_has_files_of_its_own() -> None:
    opening = starting(JOB)
    assert log_name(3, opening) == "rank-3"
    assert log_name(3, opening.model_copy(update={"restarts": 2})) == "rank-3-start-3"


def test_a_failure_keeps_its_rank_and_evidence_on_its_way_to_the_status() -> None:
    failure = TrainerError(FailureClass.DIVERGED, "the loss is nan")
    failure.evidence = "s3://b/logs/attempt-1/last-lines-rank-3.txt"
    again = TrainerError.from_report(failure.report(3)).report()
    assert (again.rank, again.evidence) == (3, failure.evidence)
