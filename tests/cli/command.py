"""The `dsft` command as a user has it: manifests in a folder, processes that end with the test, and what a run leaves behind.

Everything is real: the installed script, torch elastic or Ray, tiny models. See `tests/trainer/tiny.py`.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from dsft_api.problem import path_of
from dsft_api.resource import DeepSpeedFineTune
from dsft_api.status import FineTuneStatus

# A start takes 10 s on two free cores. Bounds are for what hangs, not for what is slow.
SECONDS = 240.0


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All that it printed."""
        return self.out + self.err


@dataclass(frozen=True)
class RunFolder:
    """What a run leaves behind."""

    path: Path

    @property
    def status(self) -> FineTuneStatus:
        status = DeepSpeedFineTune.model_validate(yaml.safe_load((self.path / "status.yaml").read_text())).status
        assert status is not None
        return status

    @property
    def step(self) -> int:
        """The step that its trainer told last."""
        path = self.path / "channel" / "dsft-progress.json"
        return json.loads(path.read_text()).get("progress", {}).get("step", 0) if path.exists() else 0

    @property
    def commits(self) -> list[str]:
        return sorted(path.parent.name for path in self.path.glob("checkpoints/*/COMMIT.json"))

    def claim(self, attempt: int) -> dict[str, Any]:
        """What an attempt started from."""
        return json.loads((self.path / "attempts" / f"a{attempt}.g1.json").read_text())

    def values(self, kind: str, name: str, attempt: int | None = None) -> dict[int, float]:
        """A metric by step: `train` or `eval`, of one attempt or of all."""
        parts = sorted(self.path.glob(f"metrics/a{attempt or '*'}.g*.jsonl"))
        lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        return {line["step"]: line[name] for line in lines if line["kind"] == kind}

    def log(self, attempt: int = 1) -> str:
        path = self.path / "logs" / f"attempt-{attempt}.log"
        return path.read_text(errors="replace") if path.exists() else "no log"


@dataclass(frozen=True)
class Dsft:
    """The command, in a folder of its own."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def write(self, manifest: Mapping[str, Any]) -> str:
        """The manifest as a file; its path."""
        path = self.folder / f"{manifest['metadata']['name']}.yaml"
        path.write_text(yaml.safe_dump(manifest, sort_keys=False))
        return str(path)

    def run_folders(self) -> list[RunFolder]:
        """All runs that stored something, oldest first."""
        found = sorted(self.runs.glob("*/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
        return [RunFolder(path.parent) for path in found]

    def __call__(self, *arguments: str) -> Ended:
        """Run it to its end."""
        with self.start(*arguments) as running:
            return running.wait()

    @contextmanager
    def start(self, *arguments: str) -> Iterator["Running"]:
        """Start it in a process group of its own, as a shell does. Whatever is left at the end is killed."""
        for name in ("runs", "scratch"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("dsft")), *arguments],
            env=os.environ
            | {
                "DSFT_RUNS": str(self.runs),
                "DSFT_SCRATCH": str(self.folder / "scratch"),
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
            | self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        running = Running(process)
        try:
            yield running
        finally:
            running.end()


@dataclass(frozen=True)
class Running:
    """A `dsft` process and its children."""

    process: "subprocess.Popen[str]"

    def wait(self) -> Ended:
        out, err = self.process.communicate(timeout=SECONDS)
        return Ended(self.process.returncode, out, err)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, while the process lives."""
        until(lambda: condition() or self.process.poll() is not None)
        if not condition():
            raise AssertionError(f"dsft ended with {self.process.returncode}: {self.process.communicate()}")

    def press_ctrl_c(self) -> None:
        """What a terminal does: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []

    def end(self) -> None:
        """Kill what is left."""
        for process in self.descendants():
            process.kill()
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: if it is not so in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def edited(manifest: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with some fields changed, by their paths; None takes a field out."""
    document = copy.deepcopy(dict(manifest))
    for name, value in edits.items():
        *above, last = path_of(name)
        part: Any = document
        for step in above:
            part = part[step] if isinstance(step, int) else part.setdefault(step, {})
        if value is None:
            part.pop(last, None)
        else:
            part[last] = value
    return document


def classifier(model: Path, data: Path, **edits: Any) -> dict[str, Any]:
    """A manifest: the tiny BERT, 24 steps of 8 rows, a checkpoint every 6 and an evaluation every 8 steps."""
    manifest = {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"uri": model.as_uri(), "task": "sequence-classification"},
            "data": {"train": {"uri": data.as_uri(), "format": "classification"}, "evalFraction": 0.25},
            "training": {
                "maxSteps": 24,
                "globalBatchSize": 8,
                "optimizer": {"learningRate": 3.0e-3},
                "schedule": {"type": "constant"},
                "precision": "fp32",
            },
            "evaluation": {"everySteps": 8},
            "execution": {"device": "cpu", "microBatchSize": 4},
            "checkpoint": {"everySteps": 6, "keepLast": 2, "keepBest": 1},
        },
    }
    return edited(manifest, edits)
