"""From the death of a rank to the next step that is done: how long lost ranks take to start again inside an attempt.

`python -m tests.bench.recover [KILLS]`, on an idle machine. Two runs on Ray, two ranks on CPU each, a tiny model and a checkpoint
every few steps: what is measured is noticing, starting, importing and loading, not training. One is ours; the other is what Ray
Train does by itself (`plain_ray.py`). They take turns: while one is killed and recovers, the other stands still (SIGSTOP). Each
kill is a SIGKILL of a rank, after a commit of that start. Exits 1 if the goal is missed: a median of 10 s on two cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsft_api.progress import TrainerPhase
from tests.trainer import tiny
from tests.trainer.runs import Run, causal_lm, family, ranks, session, wait_until

ROOT = Path(__file__).parents[2]
GOAL_SECONDS = 10.0
STEPS = 100_000
EVERY = 20
# A report returns before it is registered: a kill in between goes back to the start, which is another matter.
REGISTERED_SECONDS = 5.0


@dataclass(frozen=True)
class Recovery:
    """One kill: seconds until status named the loss, and until a step was done; steps that were trained again."""

    step: float
    redone: int
    noticed: float | None = None

    def __str__(self) -> str:
        noticed = f"noticed {self.noticed:5.1f} s   " if self.noticed is not None else ""
        return f"{noticed}next step {self.step:5.1f} s   steps trained again {self.redone}"


class Ours:
    """A run that would go on for hours."""

    def __init__(self, folder: Path) -> None:
        model, data = tiny.llama(folder / "model"), tiny.dataset(folder, "prompt_completion")
        document = causal_lm("recover", model, data, steps=STEPS)
        document["spec"]["checkpoint"] = {"everySteps": EVERY, "keepLast": 2}
        document["spec"]["export"] = {"format": "none"}
        self.run = Run(document, folder / "run")
        self.number = 0

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[bytes]"]:
        with self.run.started("ray") as process:
            yield process

    def recover(self, process: "subprocess.Popen[bytes]") -> Recovery:
        """Kill a rank of this start once that has committed; see the next start make a step."""
        self.number += 1
        number = self.number

        def has(restarts: int, phase: TrainerPhase | None = None) -> bool:
            progress = self.run.told()
            assert process.poll() is None, self.run.log_tail()
            return progress is not None and progress.restarts == restarts and phase in (None, progress.phase)

        def has_committed() -> bool:
            return any(name.endswith(f"-a1.g{number}") and whole for name, whole in self.run.checkpoints().items())

        wait_until(lambda: has(number - 1, TrainerPhase.TRAINING) and has_committed(), f"a commit of start {number}")
        begin = time.monotonic()
        kill_rank(process)
        wait_until(lambda: has(number), "the loss in the progress document")
        noticed = time.monotonic() - begin
        wait_until(lambda: has(number, TrainerPhase.TRAINING), "a step of the next start")
        step = time.monotonic() - begin
        progress = self.run.told()
        assert progress is not None
        lost = progress.losses[-1].step or 0
        return Recovery(step, lost - self.run.claims()[-1].base_step, noticed)


class Plain:
    """The same, by Ray Train alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny.llama(folder / "model")

    @contextmanager
    def started(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "tests.bench.plain_ray", str(self.folder), str(STEPS), str(EVERY)]
        with session(command, self.folder / "log", PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0") as process:
            yield process

    def events(self) -> list[tuple[str, int]]:
        """What rank 0 told, with the beginnings of starts."""
        file = self.folder / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line["what"], line["step"]) for line in map(json.loads, lines)]

    def recover(self, process: "subprocess.Popen[bytes]") -> Recovery:
        """As ours."""
        seen = len(self.events())
        self._await(process, lambda: any(what == "reported" for what, _ in self.events()[seen:]), "a report")
        threading.Event().wait(REGISTERED_SECONDS)
        before = self.events()
        begin = time.monotonic()
        kill_rank(process)
        self._await(process, lambda: self._stepped(len(before)), "a step of the next start")
        step = time.monotonic() - begin
        resumed = next(number for what, number in self.events()[len(before) :] if what == "begin")
        return Recovery(step, before[-1][1] - resumed)

    def _stepped(self, since: int) -> bool:
        kinds = [what for what, _ in self.events()[since:]]
        return "begin" in kinds and "step" in kinds[kinds.index("begin") :]

    def _await(self, process: "subprocess.Popen[bytes]", fact: Callable[[], bool], what: str) -> None:
        wait_until(lambda: process.poll() is not None or fact(), what)
        assert process.poll() is None, (self.folder / "log").read_text()[-3000:]


def kill_rank(process: "subprocess.Popen[bytes]") -> None:
    """The second of the two."""
    members = ranks(process)
    assert len(members) == 2, members
    members[1].kill()


@contextmanager
def standing_still(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """While the other arm is measured."""
    members = family(process)
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.suspend()
    try:
        yield
    finally:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.resume()


def main() -> int:
    """Kill, print each recovery and the medians, judge."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    found: dict[str, list[Recovery]] = {"ours": [], "Ray Train": []}
    with tempfile.TemporaryDirectory() as name:
        ours, plain = Ours(Path(name) / "ours"), Plain(Path(name) / "plain")
        with ours.started() as one, plain.started() as other:
            wait_until(lambda: bool(ours.run.newest_step() and plain.events()), "both to train")
            for number in range(1, kills + 1):
                with standing_still(other):
                    found["ours"].append(ours.recover(one))
                with standing_still(one):
                    found["Ray Train"].append(plain.recover(other))
                for arm, recoveries in found.items():
                    print(f"kill {number}: {arm}: {recoveries[-1]}", flush=True)
        ours.run.assert_commits_whole()
    for arm, recoveries in found.items():
        steps = [recovery.step for recovery in recoveries]
        redone = statistics.median(recovery.redone for recovery in recoveries)
        print(
            f"{arm}: median of {kills}: next step {statistics.median(steps):.1f} s ({min(steps):.1f} to {max(steps):.1f}), "
            f"steps trained again {redone:.0f}"
        )
    noticed = statistics.median(recovery.noticed or 0.0 for recovery in found["ours"])
    median = statistics.median(recovery.step for recovery in found["ours"])
    print(f"ours: noticed after {noticed:.1f} s; load {os.getloadavg()[0]:.1f}")
    print(f"goal, next step within {GOAL_SECONDS:.0f} s: {'met' if median <= GOAL_SECONDS else 'MISSED'}")
    return 0 if median <= GOAL_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
