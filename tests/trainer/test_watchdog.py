"""When a rank counts as hung, and what is left of it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsft_api.conditions import FailureClass
from dsft_api.layout import RESULT_FILE
from dsft_trainer import collectives
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.progress import Pace
from dsft_trainer.watchdog import LONG_SECONDS, MARGIN_SECONDS, Watchdog, archived_stacks
from tests.trainer import slow_start, tiny
from tests.trainer.runs import causal_lm, first_attempt

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30


def pace_of(*steps: float) -> Pace:
    now = 0.0
    pace = Pace(lambda: now)
    for seconds in steps:
        now += seconds
        pace.step(1)
    return pace


@pytest.mark.parametrize(
    ("steps", "stall", "limit"),
    [
        ((), 1800, 1800),
        ((2, 2, 2), 1800, 1800),
        ((100, 100, 100), 1800, 2000),
        # One slow step among many, or a first one that compiles, says nothing.
        ((900, 1, 1, 1, 1), 1800, 1800),
        # The last 20 count.
        ((1,) * 30 + (100,) * 20, 60, 2000),
    ],
)
def test_the_limit(steps: tuple[float, ...], stall: float, limit: float) -> None:
    watchdog = Watchdog(stall, lambda _: None, lambda _: None)
    watchdog.pace = pace_of(*steps)
    assert watchdog.limit == limit


def test_a_pause_is_no_step_and_does_not_make_forget_how_long_one_takes() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    now = 100.0
    pace.step(1)
    now = 5000.0
    pace.pause()
    assert pace.median_step == 100
    now = 5100.0
    pace.step(1)
    assert pace.median_step == 100


def test_a_rank_without_a_beat_reports_stays_for_its_peers_and_leaves() -> None:
    hung, left = threading.Event(), threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    with Watchdog(0.2, lambda _: hung.set(), lambda _: None, leave):
        assert hung.wait(PATIENCE_SECONDS)
        told = time.monotonic()
        assert left.wait(PATIENCE_SECONDS)
    assert codes == [FailureClass.HANG.failure.exit_code]
    assert time.monotonic() - told > 1, "it takes its peers with it"


def test_collectives_outlast_it() -> None:
    """They would give up first where steps are long, and what is slow would look like a rank that was lost."""
    told: list[float] = []
    heard = threading.Event()

    def outlast(seconds: float) -> None:
        told.append(seconds)
        heard.set()

    watchdog = Watchdog(0.5, lambda _: None, outlast, lambda _: None)
    watchdog.pace = pace_of(100)
    with watchdog:
        assert heard.wait(PATIENCE_SECONDS)
    assert told == [2 * 2000 + MARGIN_SECONDS]


def test_long_work_is_no_hang_and_what_follows_it_is_watched() -> None:
    """For a day, and collectives with it, in which the other ranks wait."""
    told: list[float] = []
    hung = threading.Event()
    now = [0.0]
    with Watchdog(0.2, lambda _: hung.set(), told.append, lambda _: None, clock=lambda: now[0]) as watchdog:
        with watchdog.patient():
            assert told == [LONG_SECONDS + MARGIN_SECONDS]
            now[0] += LONG_SECONDS - 1
            assert not hung.wait(1)
        assert told == [LONG_SECONDS + MARGIN_SECONDS, 0.2 + MARGIN_SECONDS]
        assert not hung.wait(1)
        now[0] += 1
        assert hung.wait(PATIENCE_SECONDS)


def test_long_work_that_never_ends_is_a_hang() -> None:
    hung = threading.Event()
    now = [0.0]
    watchdog = Watchdog(0.2, lambda _: hung.set(), lambda _: None, lambda _: None, clock=lambda: now[0])
    with watchdog, watchdog.patient():
        now[0] += LONG_SECONDS + 1
        assert hung.wait(PATIENCE_SECONDS)


@pytest.mark.slow
def test_hours_of_fetching_tokenising_and_exporting_are_no_hang(tmp_path: Path) -> None:
    """One rank of two does it, and the other one waits."""
    document = causal_lm("slow", tiny.llama(tmp_path / "model"), tiny.dataset(tmp_path, "text"), steps=2)
    job = first_attempt(document["spec"], storage=(tmp_path / "run").as_uri(), ranks=2)
    (tmp_path / "jobs" / "slow").mkdir(parents=True)
    (tmp_path / "jobs" / "slow" / "job.json").write_text(job.to_json())
    ranks = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(slow_start.__file__, str(tmp_path / "jobs")),
        ],
        env=os.environ | {"DSFT_SCRATCH": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ranks.returncode == 0, ranks.stdout + ranks.stderr
    assert {path.name for path in (tmp_path / "jobs").glob("slow-*")} == {
        "slow-fetch",
        "slow-tokenize_here",
        "slow-export",
    }
    assert (tmp_path / "run" / RESULT_FILE).exists()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_how_long_collectives_wait_can_be_changed_from_a_thread() -> None:
    default, clone = dist.distributed_c10d._get_default_group(), dist.new_group()
    assert isinstance(clone, dist.ProcessGroup)
    changing = threading.Thread(target=collectives.outlast, args=(5000.0, clone))
    changing.start()
    changing.join()
    for group in (default, clone):
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 5000


def test_stacks_are_in_storage_and_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = open_store(tmp_path.as_uri())
    failure = archived_stacks(store, "logs/attempt-3/stacks-rank-1.txt", 40)
    text = (tmp_path / "logs/attempt-3/stacks-rank-1.txt").read_text()
    assert "test_stacks_are_in_storage_and_in_the_log" in text
    assert text in capfd.readouterr().err
    assert failure.failure_class is FailureClass.HANG
    assert failure.message.startswith("no step, save or evaluation batch finished in 40 s; stacks are in file://")
    assert f"{tmp_path.as_uri()}/logs/attempt-3/stacks-rank-*" in failure.message


def test_a_hang_ends_where_storage_is_gone_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Gone:
        uri = tmp_path.as_uri()

        def put_bytes(self, key: str, data: bytes) -> bool:
            raise TrainerError(FailureClass.UNKNOWN, "storage is gone")

    store: Store = Gone()  # type: ignore[assignment]
    failure = archived_stacks(store, "logs/attempt-3/stacks-rank-1.txt", 40)
    assert failure.message == "no step, save or evaluation batch finished in 40 s; stacks are in the log"
    assert "most recent call first" in capfd.readouterr().err
