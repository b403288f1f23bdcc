"""Whole runs of the operator, its queue and its resync in virtual time, with one disturbance at one point of the run.

An undisturbed run is recorded first: each call of the ports, and each watch event. The points are all of them, in all ways:
the process dies before or after the call, the request or the reply is lost, a read is late by so many versions, an event is
dropped. What is random is seeded, and no time passes, so a disturbed run is the recorded one up to its point.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from functools import partial
from typing import Any, cast

from dsft_operator.core.observed import Unknown
from dsft_operator.ports import Conflict, Key, Kube, KubeError, RayError, RayJobs
from dsft_operator.runtime.health import Health
from dsft_operator.runtime.reconciler import Reconciler
from dsft_operator.runtime.workers import resync, work
from dsft_operator.runtime.workqueue import WorkQueue
from tests.unit.operator.fake_ports import FakeKube, FakeRay, WorldClock
from tests.unit.operator.situations import CONFIG, NOW
from tests.unit.operator.world import KEY, Crash, World

# A user in this world: each condition that is yielded is waited for.
Until = Callable[[], bool]
User = Callable[[World], Iterator[Until]]

CALL_SECONDS = 0.02
EVENT_SECONDS = 0.1
TICK_SECONDS = 5.0
RESTART_SECONDS = 7.0
# Nothing has changed for longer than the longest time between two resyncs.
RESYNC_SECONDS = 100.0
REST_SECONDS = RESYNC_SECONDS * 1.2 + 20
MOST_SECONDS = 6000.0

SILENCE = "the connection was reset"
KUBE_READS = ("run", "runs", "cluster", "preflight", "pods", "queueing", "warnings", "node_trouble")
RAY_READS = ("head", "job", "progress")
MOST_LATE = 3


class Way(StrEnum):
    """What goes wrong at a point."""

    DIES_BEFORE = "dies before"
    DIES_AFTER = "dies after"
    REQUEST_LOST = "request lost"
    REPLY_LOST = "reply lost"
    LATE = "read is late"
    DROPPED = "event dropped"
    MEANWHILE = "something happens meanwhile"


AT_EACH_CALL = (Way.DIES_BEFORE, Way.DIES_AFTER, Way.REQUEST_LOST, Way.REPLY_LOST)


@dataclass(frozen=True)
class Point:
    """Where a run is disturbed: at the call or event of that number, from 1. `late`: by how many versions."""

    way: Way
    at: int
    late: int = 0


@dataclass
class Simulation:
    """One run of the operator in a world, from apply to rest."""

    world: World
    user: User | None = None
    point: Point | None = None
    meanwhile: Callable[[World], None] | None = None  # what happens right before the call of a point
    calls: list[str] = field(default_factory=list[str])
    events: list[str] = field(default_factory=list[str])
    versions: list[int] = field(default_factory=list[int])  # how many answers each call has had so far, if it is a read
    restarts: int = 0
    _answers: dict[Any, list[Any]] = field(default_factory=dict[Any, Any])
    _queue: WorkQueue | None = None
    _changed_at: float = 0.0

    def run(self) -> "Simulation":
        """Live until nothing changes any more. Raises what a law or a pass raised."""
        passes = _Errors()
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            logging.getLogger("dsft_operator").addHandler(passes)
            try:
                runner.run(self._live())
            finally:
                logging.getLogger("dsft_operator").removeHandler(passes)
        assert not passes.errors, passes.errors
        return self

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen = self._snapshot()
        self._users_wish = self._follow_user()
        next(self._users_wish)
        world = asyncio.create_task(self._world())
        while True:
            operator = self._operator()
            done, _ = await asyncio.wait([world, *operator], return_when=asyncio.FIRST_COMPLETED)
            self._queue = None
            for task in operator:
                task.cancel()
            ends = await asyncio.gather(*operator, return_exceptions=True)
            if world in done:
                return world.result()
            others = [end for end in ends if not isinstance(end, (Crash, asyncio.CancelledError))]
            assert not others, others
            self.restarts += 1
            await asyncio.sleep(RESTART_SECONDS)

    def _operator(self) -> list[asyncio.Task[None]]:
        """A fresh process: all it knows is what it reads."""
        queue = self._queue = WorkQueue(random.Random(1))
        kube, ray = cast("Kube", _Port(self, FakeKube(self.world))), cast("RayJobs", _Port(self, FakeRay(self.world)))
        reconciler = Reconciler(kube, ray, WorldClock(self.world), CONFIG)
        health = Health(RESYNC_SECONDS, self._loop.time)
        again = resync(queue, kube, health, reconciler, RESYNC_SECONDS, random.Random(2))
        return [asyncio.create_task(work(queue, reconciler)), asyncio.create_task(again)]

    async def _world(self) -> None:
        """Let the world go on by itself until it is at rest."""
        while self._loop.time() - self._changed_at < REST_SECONDS:
            await asyncio.sleep(TICK_SECONDS)
            self._set_clock()
            was_down = self.world.api_down
            self.world.tick(0)
            self._notice()
            if was_down and not self.world.api_down:
                self._deliver()  # a watch that begins anew lists all there is
            if self.world.without:
                self._changed_at = self._loop.time()
            assert self._loop.time() < MOST_SECONDS, f"never at rest: {self.world.seen_status.message}"

    def _follow_user(self) -> Iterator[None]:
        for condition in self.user(self.world) if self.user is not None else ():
            while not condition():
                yield
        while True:
            yield

    def _set_clock(self) -> None:
        self.world.now = NOW + timedelta(seconds=int(self._loop.time()))

    # --- calls

    async def call(self, name: str, args: tuple[Any, ...], effect: Callable[[], Any]) -> Any:
        """One call of a port, with what goes wrong at it."""
        await asyncio.sleep(CALL_SECONDS)
        self._set_clock()
        self.calls.append(_label(name, args))
        known = self._answers.setdefault((name, *(part for part in args if isinstance(part, str))), [])
        self.versions.append(len(known) if name in KUBE_READS else 0)
        point = self.point
        way = point.way if point and point.way is not Way.DROPPED and point.at == len(self.calls) else None
        if way is Way.MEANWHILE and self.meanwhile is not None:
            self.meanwhile(self.world)
            self._notice()
        if way is Way.DIES_BEFORE:
            raise Crash
        if way is Way.REQUEST_LOST:
            return _silence(name)
        try:
            answer, error = await effect(), None
        except (Conflict, KubeError) as refusal:
            answer, error = None, refusal
        self._notice()
        if way is Way.DIES_AFTER:
            raise Crash
        if way is Way.REPLY_LOST:
            return _silence(name)
        if error is not None:
            raise error
        if way is Way.LATE and point is not None:
            return known[-point.late]
        if not known or known[-1] != answer:
            known.append(answer)
        return answer

    # --- watches

    def _notice(self) -> None:
        """Send an event for each object that has changed, and let the user see it."""
        next(self._users_wish)
        now = self._snapshot()
        changed = [name for name in now.keys() | self._seen.keys() if now.get(name) != self._seen.get(name)]
        self._seen = now
        for name in sorted(changed):
            self._changed_at = self._loop.time()
            self.events.append(name)
            if self.point == Point(Way.DROPPED, len(self.events)):
                continue
            self._loop.call_later(EVENT_SECONDS, self._deliver)

    def _deliver(self) -> None:
        if self._queue is not None:
            self._queue.add(KEY)

    def _snapshot(self) -> dict[str, Any]:
        world = self.world
        clusters = {
            f"RayCluster {c.name}": (c.uid, c.deleting, c.suspended, c.seen, c.ready, world.pods_without_secret(c.name))
            for c in world.clusters.values()
        }
        jobs = {f"Job {job.name}": (job.uid, job.deleting, min(job.age, 2)) for job in world.jobs.values()}
        return {"resource": (world.version, world.gone), "pods": world.pods, **clusters, **jobs}


class _Port:
    """A port each of whose calls goes through the simulation."""

    def __init__(self, simulation: Simulation, port: Any) -> None:
        self._simulation = simulation
        self._port = port

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await self._simulation.call(name, args, partial(method, *args, **options))

        return call


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it has nothing to do, and then at once."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_NoWaiting(self))  # type: ignore[arg-type]

    def time(self) -> float:
        return self._virtual

    def sleep_until_due(self, seconds: float) -> None:
        self._virtual += seconds


class _NoWaiting:
    """A selector that takes no time and has nothing to read: all happens inside the process."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits for everybody"
        self._loop.sleep_until_due(max(0.0, timeout))
        return []

    def register(self, *_: Any) -> None: ...

    def unregister(self, *_: Any) -> None: ...

    def get_map(self) -> dict[Any, Any]:
        return {}

    def get_key(self, _: Any) -> Any:
        raise KeyError

    def close(self) -> None: ...


class _Errors(logging.Handler):
    """What a pass raised that is no answer of an API: the worker logs it and lives on."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(self.format(record))


def _silence(name: str) -> Unknown:
    if name in RAY_READS:
        return Unknown("refused")
    raise RayError(SILENCE) if name in ("submit", "stop") else KubeError(SILENCE)


def _label(name: str, args: tuple[Any, ...]) -> str:
    match name, args:
        case "create", (manifest,):
            return f"create {manifest['kind']}"
        case "event", (_, _, reason, _):
            return f"event {reason}"
        case "apply_status", (_, status, _):
            return f"apply_status {status.phase}"
        case _:
            words = [part for part in args if isinstance(part, str) and not isinstance(part, Key)]
            return " ".join([name, *words[:1]])


def points(recorded: Simulation) -> list[Point]:
    """Every point at which a recorded run can be disturbed."""
    calls = range(1, len(recorded.calls) + 1)
    return [
        *(Point(way, at) for way in AT_EACH_CALL for at in calls),
        *(
            Point(Way.LATE, at, late)
            for at, versions in enumerate(recorded.versions, 1)
            for late in range(1, min(MOST_LATE, versions) + 1)
        ),
        *(Point(Way.DROPPED, at) for at in range(1, len(recorded.events) + 1)),
    ]
