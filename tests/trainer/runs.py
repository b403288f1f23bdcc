"""Runs of `dsft run` as a user starts them: processes of their own, killed without mercy, judged by what is in storage."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from dsft_api.job import Job, Ranks, RunRef
from dsft_api.layout import CHECKPOINTS, EXPORT, RESULT_FILE
from dsft_api.manifest import parse
from dsft_api.progress import Progress
from dsft_api.spec import FineTuneSpec
from dsft_cli.local_run import LocalRun, find_run
from dsft_trainer.checkpoint.commits import COMMIT_FILE, Claim, ClaimId, Commit, parse_name
from dsft_trainer.checkpoint.listing import read_claims, read_commits
from dsft_trainer.checkpoint.store import Store, open_store
from dsft_trainer.runtime.channel import Channel

# Generous, since others may use the cores: a start takes 10 s on two free ones, and 20 s with Ray.
PATIENCE_SECONDS = 240.0

Manifest = dict[str, Any]

_FORK_SERVER = "multiprocessing.forkserver"


def causal_lm(name: str, model: Path, train: Path, *, steps: int, seed: int = 7) -> Manifest:
    """A manifest of `steps` steps on CPU in fp32: a causal-lm on the rows of FORMAT.jsonl. To be changed by its reader."""
    return {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": model.as_uri(), "task": "causal-lm"},
            "data": {"train": {"uri": train.as_uri(), "format": train.stem}, "maxLength": 128},
            "training": {
                "maxSteps": steps,
                "globalBatchSize": 8,
                "optimizer": {"learningRate": 3e-3, "weightDecay": 0.1},
                "schedule": {"type": "constant"},
                "precision": "fp32",
                "seed": seed,
            },
            "execution": {"device": "cpu", "microBatchSize": 2},
            "tracking": {"tensorboard": False},
        },
    }


def first_attempt(
    spec: FineTuneSpec | Mapping[str, Any], *, storage: str = "file:///runs", ranks: int = 1, **fields: Any
) -> Job:
    """A job for a part of the trainer, of a run of this spec on CPU."""
    return Job(
        run=RunRef(namespace="default", name="tiny", uid="u"),
        attempt=1,
        spec=spec if isinstance(spec, FineTuneSpec) else FineTuneSpec.model_validate(spec),
        spec_hash="sha256:0",
        storage_prefix=storage,
        ranks=Ranks(count=ranks, device="cpu", threads=1),
        **fields,
    )


def wait_until(fact: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Look every few milliseconds, for a bounded time."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        begin = time.monotonic()
        if fact():
            return
        assert begin < deadline, f"not within {seconds:.0f} s: {what}"
        # A look at object storage costs the CPU that the run needs: look a third of the time at most.
        pause.wait(max(0.002, 2 * (time.monotonic() - begin)))


@dataclass
class Run:
    """One manifest with a runs folder of its own."""

    manifest: Manifest
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.file.write_text(yaml.safe_dump(self.manifest))
        local = self.local()
        # By the environment's way, which may be another than the run's own endpoint.
        self.store: Store = open_store(local.storage_prefix)
        self._channel = Channel(local.channel)

    @property
    def file(self) -> Path:
        return self.folder / "manifest.yaml"

    def local(self) -> LocalRun:
        """What the CLI finds."""
        return find_run(parse(self.file.read_text(), str(self.file)), self.folder / "runs")

    @contextmanager
    def started(self, runtime: str = "torchrun", workers: int = 2) -> Iterator["subprocess.Popen[bytes]"]:
        """`dsft run` as the leader of a session, which does not outlive the block."""
        dsft = Path(sys.executable).with_name("dsft")
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        with session(
            [str(dsft), "run", "-f", str(self.file), "--runtime", runtime, "--workers", str(workers)],
            self.folder / "cli.log",
            PATH=f"{dsft.parent}{os.pathsep}{os.environ['PATH']}",
            DSFT_RUNS=str(self.folder / "runs"),
            DSFT_SCRATCH=str(scratch),
        ) as process:
            yield process

    def finish(self, runtime: str = "torchrun", workers: int = 2, seconds: float = PATIENCE_SECONDS) -> None:
        """Run to the end, which must be a good one."""
        with self.started(runtime, workers) as process:
            code = process.wait(seconds)
        assert code == 0, f"exit code {code}:\n{self.log_tail()}"
        assert self.store.get_bytes(RESULT_FILE) is not None

    def told(self) -> Progress | None:
        """The trainer's last document."""
        return self._channel.progress()

    def log_tail(self) -> str:
        """The end of what the CLI and the newest attempt printed."""
        local = self.local()
        logs = [self.folder / "cli.log", *(local.log_file(n) for n in (local.attempts, local.attempts + 1))]
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs if path.exists())

    def claims(self) -> list[Claim]:
        """All of them, oldest first."""
        return read_claims(self.store)

    def checkpoints(self) -> dict[str, bool]:
        """The folders there are, and whether each is committed."""
        keys = [entry.key.split("/") for entry in self.store.list(CHECKPOINTS)]
        committed = {name for _, name, *rest in keys if rest == [COMMIT_FILE]}
        return {name: name in committed for _, name, *_ in keys}

    def newest_step(self) -> int:
        """The largest committed step; 0 if there is none."""
        parsed = [parse_name(name) for name, committed in self.checkpoints().items() if committed]
        return max((step for step, _ in filter(None, parsed)), default=0)

    def metrics(self, claim: ClaimId) -> list[dict[str, Any]]:
        """The lines that a group start stored, in order."""
        return metrics_of(self.store, claim)

    def losses(self) -> list[float]:
        """The training loss of every step of a run that was never interrupted."""
        (claim,) = self.claims()
        return [line["loss"] for line in self.metrics(claim.id) if line["kind"] == "train"]

    def weights(self) -> dict[str, str]:
        """Digests of the exported weights, by file."""
        entries = [entry for entry in self.store.list(EXPORT) if entry.key.endswith(".safetensors")]
        return {e.key: hashlib.sha256(self.store.get_bytes(e.key) or b"").hexdigest() for e in entries}

    def assert_commits_whole(self) -> None:
        """Every commit that counts has every file it lists, bit for bit. Also while the run goes on."""
        for name in (commit.name for commit in read_commits(self.store)):
            fault = fault_of(self.store, name)
            # Retention takes COMMIT.json away before anything else.
            assert not fault or self.store.get_bytes(f"{CHECKPOINTS}/{name}/{COMMIT_FILE}") is None, fault


def metrics_of(store: Store, claim: ClaimId) -> list[dict[str, Any]]:
    """The lines that a group start stored, in order."""
    keys = [entry.key for entry in store.list("metrics") if entry.key.startswith(f"metrics/{claim}-")]
    return [json.loads(line) for key in keys for line in (store.get_bytes(key) or b"").splitlines()]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the metrics without what the clock decides."""
    return {name: value for name, value in line.items() if name != "tokens_per_second"}


def fault_of(store: Store, name: str) -> str | None:
    """What is wrong with a committed checkpoint; None also where it is not committed."""
    folder = f"{CHECKPOINTS}/{name}"
    manifest = store.get_bytes(f"{folder}/{COMMIT_FILE}")
    if manifest is None:
        return None
    commit = Commit.model_validate_json(manifest)
    if {file.rank for file in commit.files} != set(range(commit.world_size)):
        return f"{name} lacks the files of a rank"
    sizes = {entry.key: entry.size for entry in store.list(folder)}
    for file in commit.files:
        key = f"{folder}/{file.path}"
        digest = hashlib.sha256(store.get_bytes(key) or b"").hexdigest()
        if sizes.get(key) != file.size or digest != file.sha256:
            return f"{key} is not what was committed"
    return None


def family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """A process and all below it, to be asked about after its death."""
    leader = psutil.Process(process.pid)
    return [leader, *leader.children(recursive=True)]


def driver(process: "subprocess.Popen[bytes]") -> psutil.Process:
    """The trainer that `dsft run` started."""
    (found,) = [child for child in psutil.Process(process.pid).children() if "dsft_trainer" in _command(child)]
    return found


def ranks(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes that train, with Ray or torch elastic, whose ranks are forked from a fork server."""
    found = []
    for member in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            is_forked = all(_FORK_SERVER in " ".join(_command(part)) for part in (member, member.parent()))
            if is_alive(member) and (is_rank_of_ray(member) or is_forked):
                found.append(member)
    return found


def is_rank_of_ray(process: psutil.Process) -> bool:
    """By its name, which a child has too between its fork and what it then runs. False for one that is gone."""
    try:
        parent = process.parent()
        return "RayTrainWorker" in process.name() and (parent is None or "RayTrainWorker" not in parent.name())
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process | None) -> list[str]:
    """Its arguments; none of a process that is gone."""
    if process is None:
        return []
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@contextmanager
def session(command: Sequence[str], log: Path, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command as the leader of a session, which does not outlive the block; what it prints is added to the log."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command, env=os.environ | env, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        kill_session(process)


def kill_session(process: "subprocess.Popen[bytes]") -> int:
    """SIGKILL for every process group of the leader's session, as when a machine goes away; the leader's exit code."""
    for group in _groups_of_session(process.pid):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    return process.wait(30)


def _groups_of_session(leader: int) -> set[int]:
    groups = set()
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getsid(pid) == leader:
                groups.add(os.getpgid(pid))
    return groups


def is_alive(process: psutil.Process) -> bool:
    """False for a process that only waits for somebody to read its exit code: none of its threads holds a file any more."""
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
