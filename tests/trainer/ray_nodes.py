"""A Ray cluster as KubeRay makes one, of processes on this machine: a head without CPUs, workers of one rank, token auth.

What a pod would have of its own, each node has: its environment, its scratch folder. They share the machine's address.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import aiohttp
import psutil
import yaml

from dsft_api.manifest import parse
from dsft_api.progress import Progress, TrainerPhase
from dsft_api.status import FineTuneStatus
from dsft_operator.adapters.ray_jobs import RayJobsHttp
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.observed import Head, RayJob, Run, Unknown
from dsft_operator.core.submission import CHANNEL, storage_prefix, submission
from tests.cluster.processes import free_ports
from tests.trainer.runs import PATIENCE_SECONDS, Manifest, family, kill_session

ADDRESS = "127.0.0.1"
TOKEN = uuid4().hex + uuid4().hex
_BIN = Path(sys.executable).parent

Answer = TypeVar("Answer")


@dataclass
class RayNodes:
    """Head and workers. Kill or add workers as pods come and go."""

    folder: Path
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    ports: dict[str, int] = field(default_factory=dict[str, int])
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @classmethod
    def start(cls, workers: int = 2, env: Mapping[str, str] | None = None) -> "RayNodes":
        """Start them; returns when the head's API answers. Short paths, for the sake of Ray's sockets."""
        names = ("gcs", "dashboard", "client")
        ports = dict(zip(names, free_ports(len(names), ADDRESS), strict=True))
        nodes = cls(Path(tempfile.mkdtemp(prefix="dsft-")), dict(env or {}), ports)
        nodes._start(
            "head",
            "--head",
            f"--port={ports['gcs']}",
            f"--ray-client-server-port={ports['client']}",
            f"--dashboard-port={ports['dashboard']}",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={nodes.folder / 'ray'}",
            "--num-cpus=0",
        )
        nodes.head()
        for number in range(workers):
            nodes.add_worker(f"worker-{number}")
        return nodes

    def add_worker(self, name: str, before: Sequence[str] = ()) -> None:
        """A node of one rank. `before`: the beginning of the command that starts it."""
        self._start(name, f"--address={ADDRESS}:{self.ports['gcs']}", "--num-cpus=1", before=before)
        # One after the other: two that start at once on one machine take each other's names for files.
        self._until(lambda: "Ray runtime started" in self.log(name), name)

    def kill(self, name: str) -> None:
        """SIGKILL for all of a node, as when a machine goes away."""
        kill_session(self.processes.pop(name))

    def stop(self) -> None:
        """End all, workers first, and remove what they left."""
        for name in reversed(list(self.processes)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def node_env(self, name: str) -> dict[str, str]:
        """What a container of this node sees."""
        scratch = self.folder / name
        scratch.mkdir(exist_ok=True)
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))},
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ADDRESS": f"{ADDRESS}:{self.ports['gcs']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": "150",
            "DSFT_SCRATCH": str(scratch),
            "DSFT_DRAIN_SECONDS": "120",
            **self.env,
        }

    def members(self, name: str) -> list[psutil.Process]:
        """All processes of a node."""
        return family(self.processes[name])

    def log(self, name: str) -> str:
        """What a node's container prints: with the head's, what the driver copies there."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, *arguments: str, before: Sequence[str] = ()) -> None:
        environment = self.node_env(name)
        # `ray start` joins what RAY_ADDRESS names instead of starting a head.
        address = environment.pop("RAY_ADDRESS")
        if name != "head":
            environment["RAY_ADDRESS"] = address
        agent = free_ports(1, ADDRESS)[0]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [
                    *before,
                    str(_BIN / "ray"),
                    "start",
                    "--block",
                    # Any free ones: ours lie in the range that is set aside for them.
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                    f"--dashboard-agent-listen-port={agent}",
                    "--object-store-memory=100000000",
                    *arguments,
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ask(self, question: Callable[[RayJobsHttp], Awaitable[Answer]]) -> Answer:
        """Ask the head through the operator's adapter."""

        async def asked() -> Answer:
            async with aiohttp.ClientSession() as session:
                return await question(RayJobsHttp(session, self.ports["dashboard"], 10.0))

        return asyncio.run(asked())

    def head(self) -> Head:
        """Wait until the head answers."""
        self._until(lambda: isinstance(self.ask(lambda jobs: jobs.head(ADDRESS, TOKEN)), Head), "head")
        answer = self.ask(lambda jobs: jobs.head(ADDRESS, TOKEN))
        assert isinstance(answer, Head)
        return answer

    def _until(self, fact: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not fact():
            assert self.processes[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, f"{name} is not up:\n{self.log(name)}"
            time.sleep(0.1)


@dataclass
class Attempt:
    """One submission, posted and followed as the operator does it."""

    nodes: RayNodes
    job: SubmitJob

    @property
    def submission_id(self) -> str:
        return self.job.submission_id

    def post(self) -> "Attempt":
        """Submit it."""
        self.nodes.ask(lambda jobs: jobs.submit(ADDRESS, TOKEN, self.job))
        return self

    def stop(self) -> None:
        """Ask the driver to stop."""
        self.nodes.ask(lambda jobs: jobs.stop(ADDRESS, TOKEN, self.submission_id))

    def seen(self) -> RayJob | Unknown | None:
        """The submission, as the adapter reads it."""
        return self.nodes.ask(lambda jobs: jobs.job(ADDRESS, TOKEN, self.submission_id))

    def told(self) -> Progress | Unknown | None:
        """The progress document, whoever's it is, as the adapter reads it."""
        return self.nodes.ask(lambda jobs: jobs.progress(ADDRESS, TOKEN))

    def own(self) -> Progress | None:
        """The progress document, if it is this attempt's."""
        told, meta = self.told(), self.job.metadata
        mine = isinstance(told, Progress) and (told.run_uid, str(told.attempt)) == (meta["uid"], meta["attempt"])
        return told if mine else None

    def until(self, fact: Callable[["Attempt"], bool], what: str) -> None:
        """Wait for something that a running attempt does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not fact(self):
            seen = self.seen()
            assert not (isinstance(seen, RayJob) and seen.is_over), f"it ended before {what}:\n{self.driver_log()}"
            assert time.monotonic() < deadline, f"not in time: {what}\n{self.driver_log()}"
            time.sleep(0.1)

    def ended(self) -> RayJob:
        """Wait for its end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            seen = self.seen()
            if isinstance(seen, RayJob) and seen.is_over:
                return seen
            assert time.monotonic() < deadline, f"still {seen}:\n{self.driver_log()}"
            time.sleep(0.1)

    def step(self) -> int:
        """The last step that it told of."""
        own = self.own()
        return own.progress.step if own is not None and own.progress is not None else 0

    def phase(self) -> TrainerPhase | None:
        """What it told last."""
        own = self.own()
        return own.phase if own is not None else None

    def driver_log(self) -> str:
        """The end of what the driver printed, as Ray keeps it."""
        path = self.nodes.folder / "ray" / "session_latest" / "logs" / f"job-driver-{self.submission_id}.log"
        with suppress(OSError):
            return path.read_text(errors="replace")[-8000:]
        return "no driver log"


def resource(manifest: Manifest, storage: str) -> Run:
    """The resource as the operator reads it, of a run of its own."""
    document = {
        **manifest,
        "spec": {**manifest["spec"], "storage": {**manifest["spec"].get("storage", {}), "uri": storage}},
    }
    parsed = parse(yaml.safe_dump(document))
    return Run(
        namespace="ml",
        name=parsed.metadata.name,
        uid=str(uuid4()),
        generation=1,
        resource_version="1",
        spec=parsed.spec,
        status=FineTuneStatus(),
    )


def attempt(nodes: RayNodes, run: Run, number: int) -> Attempt:
    """An attempt as the operator would submit it; only Ray's folder is another than in a pod."""
    assert run.spec is not None
    job = submission(run, run.spec, number, prefix(run))
    logs = CHANNEL.replace("/tmp/ray", str(nodes.folder / "ray"))
    pod = str(nodes.folder / "head.log")
    return Attempt(nodes, replace(job, environment=job.environment | {"DSFT_CHANNEL": logs, "DSFT_POD_STDOUT": pod}))


def prefix(run: Run) -> str:
    """The run's folder."""
    assert run.spec is not None
    return storage_prefix(run, run.spec)
