"""Kills a run without warning, again and again, and holds it against one that never was killed.

The same loss at every step, bit for bit, with dropout on; nothing that was committed is trained twice; no commit is ever
damaged; and nothing of a killed run lives on.
"""

import json
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from dsft_trainer.checkpoint.commits import Claim
from tests.trainer import tiny
from tests.trainer.runs import (
    PATIENCE_SECONDS,
    Manifest,
    Run,
    causal_lm,
    family,
    is_alive,
    kill_session,
    timeless,
    wait_until,
)

STEPS = 60
SEED = 1

KillPoint = Literal["inside a checkpoint", "between checkpoints"]
# Seconds after the folder of a checkpoint, or its COMMIT.json, appeared.
LATEST: dict[KillPoint, float] = {"inside a checkpoint": 0.03, "between checkpoints": 0.3}

# Names of processes without which no run trains: with torch elastic the ranks have the launcher's.
WITNESSES = {"torchrun": {"dsft", "python"}, "ray": {"dsft", "python", "raylet"}}


def killed_manifest(folder: Path, steps: int = STEPS, rows: int = 64) -> Manifest:
    """Two ranks, dropout, an evaluation every 4 steps and a checkpoint every 3."""
    model = tiny.llama(folder / "model")
    # The position of every rank's random generator decides the losses.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    document = causal_lm("killed", model, tiny.dataset(folder, "prompt_completion", rows), steps=steps)
    document["spec"]["data"]["evalFraction"] = 0.1
    document["spec"]["evaluation"] = {"everySteps": 4}
    document["spec"]["checkpoint"] = {"everySteps": 3}
    return document


def never_killed(manifest: Manifest, folder: Path, seconds: float = PATIENCE_SECONDS) -> Run:
    """The run that nobody kills."""
    run = Run(manifest, folder)
    run.finish(seconds=seconds)
    return run


def in_storage(manifest: Manifest, uri: str) -> Manifest:
    """The same run, stored elsewhere."""
    return {**manifest, "spec": {**manifest["spec"], "storage": {"uri": uri}}}


def killer_of(manifest: Manifest, folder: Path, runtime: str, storage: str) -> "Killer":
    """With moments of its own."""
    return Killer(Run(manifest, folder), runtime, random.Random(f"{SEED} {runtime} {storage}"))


@dataclass
class Killer:
    """Kills a run at random moments, and keeps the record."""

    run: Run
    runtime: str
    chance: random.Random
    newest_at_start: list[int] = field(default_factory=list)
    kills: list[str] = field(default_factory=list)
    torn: int = 0

    def kill(self, point: KillPoint) -> None:
        """Start the run, and kill it at the first such point."""
        delay = self.chance.uniform(0, LATEST[point])
        claims = len(self.run.claims())
        before = self.run.checkpoints()
        self.newest_at_start.append(self.run.newest_step())
        with self.run.started(self.runtime) as process:
            self._await(process, lambda: len(self.run.claims()) > claims, "a claim")
            processes = family(process)
            assert WITNESSES[self.runtime] <= {member.name() for member in processes if is_alive(member)}
            if point == "inside a checkpoint":
                self._await(
                    process, lambda: bool(self.run.checkpoints().keys() - before.keys()), "a checkpoint's folder"
                )
            else:
                self._await(process, lambda: any(self._new(before).values()), "a commit")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(delay)
            assert kill_session(process) == -9, f"the run was over before its kill:\n{self.run.log_tail()}"
        self.kills.append(f"{point} +{delay * 1000:.0f} ms")
        self._assert_nothing_lives(processes)
        self.torn += not all(self._new(before).values())
        self.run.assert_commits_whole()

    def finish(self, runtime: str) -> None:
        """Let the run come to its end."""
        self.newest_at_start.append(self.run.newest_step())
        self.run.finish(runtime)

    def _new(self, before: dict[str, bool]) -> dict[str, bool]:
        return {name: committed for name, committed in self.run.checkpoints().items() if name not in before}

    def _await(self, process: "subprocess.Popen[bytes]", fact: Callable[[], bool], what: str) -> None:
        wait_until(lambda: process.poll() is not None or fact(), what)
        assert process.poll() is None, f"the run ended before {what}:\n{self.run.log_tail()}"

    def _assert_nothing_lives(self, processes: list[psutil.Process]) -> None:
        """Launcher and ranks, and with Ray its daemons and workers, as they were when the ranks had just claimed."""
        wait_until(lambda: not any(map(is_alive, processes)), f"the end of {processes} after the kill", 30)


def lines_by_step(run: Run, kind: str) -> dict[int, dict[str, Any]]:
    """What the reference stored, without what the clock decides."""
    (claim,) = run.claims()
    return {line["step"]: timeless(line) for line in run.metrics(claim.id) if line["kind"] == kind}


@dataclass(frozen=True)
class Training:
    """What each step of the run that nobody kills gave, by kind and step."""

    trained: dict[int, dict[str, Any]]
    evaluated: dict[int, dict[str, Any]]

    @staticmethod
    def of(reference: Run) -> "Training":
        """All of it."""
        training = Training(lines_by_step(reference, "train"), lines_by_step(reference, "eval"))
        assert list(training.trained) == list(range(1, reference.manifest["spec"]["training"]["maxSteps"] + 1))
        return training

    def assert_equal(self, run: Run, claim: Claim) -> None:
        """Loss, gradient norm and evaluation of each step that a start stored are these, bit for bit."""
        lines = [timeless(line) for line in run.metrics(claim.id)]
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        assert steps == list(range(claim.base_step + 1, claim.base_step + 1 + len(steps))), claim
        for line in lines:
            expected = (self.trained if line["kind"] == "train" else self.evaluated)[line["step"]]
            assert line == expected, f"{claim.id} from step {claim.base_step}"


def assert_same_training(run: Run, reference: Run) -> None:
    """Loss, gradient norm and evaluation of every step in every attempt are the reference's, bit for bit."""
    training = Training.of(reference)
    seen: dict[str, set[int]] = {"train": set(), "eval": set()}
    for claim in run.claims():
        training.assert_equal(run, claim)
        for line in run.metrics(claim.id):
            seen[line["kind"]].add(line["step"])
    assert seen == {"train": training.trained.keys(), "eval": training.evaluated.keys()}
    assert run.weights() == reference.weights() != {}


def kill_and_compare(killer: Killer, reference: Run, finisher: str, kills: int) -> None:
    """Kill it so often, in and between checkpoints by turns, have it finished, and judge."""
    points: tuple[KillPoint, ...] = ("inside a checkpoint", "between checkpoints")
    try:
        for number in range(kills):
            killer.kill(points[number % 2])
        killer.finish(finisher)
    finally:
        # Shown by pytest when the test fails.
        print(f"seed {SEED}; {killer.torn} checkpoints were torn; kills: {', '.join(killer.kills)}")
    assert [claim.base_step for claim in killer.run.claims()] == killer.newest_at_start
    # One kill with Ray may come when its checkpoint is whole already.
    assert killer.torn > 0 or killer.runtime == "ray", "no kill came inside a checkpoint"
    assert_same_training(killer.run, reference)
