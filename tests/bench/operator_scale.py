"""What the operator costs, on a real API server and etcd: delays, requests, CPU and memory per resource, and a restart.

`python -m tests.bench.operator_scale [--count N] [--output json]`, on an idle machine. No kubelet, no KubeRay: the bench writes
the RayClusters' statuses, and one fake Ray head answers for all. The operator has the rights of examples/install/operator.yaml
and no client-side limit. Exits 1 if a goal is missed.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsft_operator.adapters.reading import run_of
from dsft_operator.config import OperatorConfig
from dsft_operator.core.decision import CreateCluster
from dsft_operator.core.observed import Observed
from dsft_operator.core.plan import plan
from dsft_operator.install import FILE, NAME, NAMESPACE
from tests.apiserver.fake_head import FakeHead
from tests.bench.operator_load import (
    CLUSTERS,
    CONNECTIONS,
    ROOT,
    RUNS,
    WRITES,
    Api,
    Json,
    OperatorProcess,
    Stopwatch,
    at_once,
    quantiles,
)
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.scratch import scratch_folder
from tests.unit.operator.situations import NOW, SPEC

SINGLES = 20
LARGE = 5  # times --count, for memory
WATCHED, BARE = "bench", "bench-floor"
IMAGE = {"trainer": "registry.test/dsft-trainer:1"}
# Only events bring a run back, so that what is counted does not grow with the time it takes.
INTERVALS = {"provisioningSeconds": 3600, "runningSeconds": 3600, "resyncSeconds": 3600}
PER_RUN_SECONDS = 1.0  # bound on waits, on a busy machine


@dataclass(frozen=True)
class Figure:
    """One line of the table; `goal` is None where there is none."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    label: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def __str__(self) -> str:
        verdict = (
            ""
            if self.met is None
            else f"  {self.label} {'>=' if self.at_least else '<='} {self.goal:g}: {'met' if self.met else 'MISSED'}"
        )
        return f"{self.name:<66} {self.value:>9.2f} {self.unit:<6}{verdict}"


@dataclass
class Bench:
    """One measurement from an empty API server on."""

    api: Api
    operator: OperatorProcess
    head: FakeHead
    count: int
    watch: Stopwatch = field(default_factory=Stopwatch)
    figures: list[Figure] = field(default_factory=list[Figure])

    async def measure(self) -> None:
        """Everything, in the order in which the operator's memory grows."""
        for name in (WATCHED, BARE):
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            await self.api.send("POST", "/api/v1/namespaces", body)
        await self.floor()
        self.operator.start()
        await self.operator.until("one run looked at", self._warm, 120)
        self.note("RSS with 0 resources", self.operator.mib, "MiB")
        watches = [
            asyncio.create_task(self.api.watch(RUNS.format(WATCHED), self.watch.on_run)),
            asyncio.create_task(self.api.watch(CLUSTERS.format(WATCHED), self.watch.on_cluster)),
        ]
        work = asyncio.create_task(self._phases())
        try:
            await asyncio.wait([work, *watches], return_when=asyncio.FIRST_COMPLETED)
            for task in (work, *watches):
                if task.done():
                    task.result()
        finally:
            for task in (work, *watches):
                task.cancel()
            await asyncio.gather(work, *watches, return_exceptions=True)

    async def _warm(self) -> bool:
        """It watches and has listed."""
        verbs = await self.operator.metrics("dsft_kubernetes_requests_total")
        return verbs.total() >= 2

    async def _phases(self) -> None:
        await self.singles()
        await self.burst()
        await self.run_all()
        await self.restart("SIGTERM", self.operator.stop)
        await self.restart("SIGKILL", self.operator.kill)
        await self.grow()

    def note(self, *figure: Any) -> None:
        self.figures.append(Figure(*figure))
        print(self.figures[-1], file=sys.stderr, flush=True)

    async def floor(self) -> None:
        """The same two writes by a client that does nothing else, as many at a time as the operator has workers."""
        config = OperatorConfig.model_validate({"image": IMAGE})
        made: dict[str, tuple[Json, Json]] = {}
        delays: dict[str, float] = {}

        async def prepare(name: str) -> None:
            raw = await self.api.send("POST", RUNS.format(BARE), run(name, BARE))
            decision = plan(Observed(run_of(raw, config)), NOW, config)
            assert decision.status is not None
            (cluster,) = (action.manifest for action in decision.actions if isinstance(action, CreateCluster))
            status = {**{key: raw[key] for key in ("apiVersion", "kind")}, "metadata": {"name": name}}
            made[name] = dict(cluster), {**status, "status": decision.status.to_wire()}

        async def write(name: str) -> None:
            cluster, status = made[name]
            begin = time.monotonic()
            await self.api.send("POST", CLUSTERS.format(BARE), cluster)
            await self.api.apply_status(RUNS.format(BARE), status)
            delays[name] = time.monotonic() - begin

        names = numbered("floor", self.count)
        await at_once(names, prepare, CONNECTIONS)
        begin = time.monotonic()
        await at_once(names, write, config.workers)
        took = time.monotonic() - begin
        median, worst = quantiles(list(delays.values()))
        self.note("floor: RayCluster and status by a bare client", self.count / took, "1/s")
        self.note("floor: the two writes, p50", median, "ms")
        self.note("floor: the two writes, p99", worst, "ms")

    async def apply(self, name: str) -> None:
        """Create a run, and note when the server answered."""
        await self.api.send("POST", RUNS.format(WATCHED), run(name, WATCHED))
        self.watch.run(name).replied = time.monotonic()

    async def settled(self, names: list[str]) -> None:
        bound = 60 + PER_RUN_SECONDS * len(names)
        await self.operator.until("RayClusters made", lambda: self.watch.settled(names), bound)

    async def singles(self) -> None:
        """One resource at a time."""
        names = numbered("single", SINGLES)
        for name in names:
            await self.apply(name)
            await self.settled([name])
        median, worst = quantiles(self.watch.delays(names))
        self.note("apply to RayCluster, one resource, p50", median, "ms")
        self.note("apply to RayCluster, one resource, p99", worst, "ms", 50, "O3")

    async def burst(self) -> None:
        """All at once: delays, requests, CPU."""
        names, count = numbered("burst", self.count), self.count
        cpu, begin = self.operator.cpu, time.monotonic()
        before = await self.api.requests()
        told = (await self.operator.metrics("dsft_kubernetes_requests_total")).total()
        await at_once(names, self.apply, CONNECTIONS)
        await self.settled(names)
        took = max(self.watch.run(name).cluster for name in names) - begin
        requests = Counter(await self.api.requests())
        requests.subtract(before)
        requests["POST", "deepspeedfinetunes"] -= count  # the bench's own
        told = (await self.operator.metrics("dsft_kubernetes_requests_total")).total() - told
        median, worst = quantiles(self.watch.delays(names))
        self.note(f"apply to RayCluster, {count} at once, p50", median, "ms")
        self.note(f"apply to RayCluster, {count} at once, p99", worst, "ms", 1000, "O3")
        self.note(f"RayClusters made, {count} at once", count / took, "1/s", 700, "O1", True)
        first = sum(self.watch.run(name).first_statuses for name in names)
        writes = (requests["POST", "rayclusters"] + first) / count
        self.note("writes per resource until the first status (child, status)", writes, "", 2, "O1")
        for (verb, resource), number in sorted(requests.items()):
            if number > 0:
                apart = "  of these write:" if verb in WRITES else "  of these read: "
                self.note(f"{apart} {verb} {resource}, until prepared", number / count, "")
        self.note("requests per resource until prepared, by the operator's metric", told / count, "")
        self.note("CPU per resource until prepared", 1000 * (self.operator.cpu - cpu) / count, "ms", 1.5, "O1")
        self.note(f"RSS with {count + SINGLES} resources", self.operator.mib, "MiB")

    async def run_all(self) -> None:
        """Play KubeRay: each RayCluster is ready, and the operator submits its job."""
        ready = {"status": ready_status()}
        clusters = await self.api.items(CLUSTERS.format(WATCHED))
        owners = {each["metadata"]["name"]: each["metadata"]["ownerReferences"][0]["name"] for each in clusters}

        async def make_ready(name: str) -> None:
            self.watch.run(owners[name]).ready = time.monotonic()
            path = f"{CLUSTERS.format(WATCHED)}/{name}/status"
            await self.api.send("PATCH", path, ready, kind="application/merge-patch+json")

        await at_once(owners, make_ready, CONNECTIONS)
        names = list(self.watch.runs)
        bound = 60 + PER_RUN_SECONDS * len(names)
        await self.operator.until("all running", lambda: self.watch.running(names), bound)
        lines = [self.watch.run(name) for name in names]
        _, told = quantiles([line.told - line.ready for line in lines])
        _, running = quantiles([line.running - line.ready for line in lines])
        self.note(f"head ready to the first status that says so, {len(names)} at once, p99", told, "ms", 1000, "O4")
        self.note(f"head ready to job running in status, {len(names)} at once, p99", running, "ms", 1000, "O3")

    async def restart(self, how: str, end: Callable[[], None]) -> None:
        """Ended and started anew while all run: nothing is written. A killed one leaves a Lease that must first run out."""
        total = len(self.watch.runs)
        await self._calm()
        before, requests = await self._versions(), await self.api.requests()
        end()
        self.operator.start()

        async def observed() -> bool:
            return await self.operator.observed() >= total

        seconds = await self.operator.until("all looked at again", observed, 60 + PER_RUN_SECONDS * total)
        await self._calm()
        after = await self.api.requests()
        after.subtract(requests)
        written = sum(number for (verb, _), number in after.items() if verb in WRITES)
        versions = await self._versions()
        changed = sum(versions.get(key) != before.get(key) for key in versions.keys() | before.keys())
        self.note(f"restart with {total} running, after {how}: start to all observed", seconds, "s", 5, "O5")
        self.note(f"restart after {how}: writes that the API server was asked for", written, "", 0, "O5")
        self.note(f"restart after {how}: resources and RayClusters that changed", changed, "", 0, "O5")

    async def grow(self) -> None:
        """Memory with many. What one more resource takes is seen within one life of the process, between few and many."""
        few = self.operator.mib
        names = numbered("more", LARGE * self.count - len(self.watch.runs))
        await at_once(names, self.apply, CONNECTIONS)
        await self.settled(names)
        many = self.operator.mib
        self.note(f"RSS with {len(self.watch.runs)} resources", many, "MiB", 150, "O2")
        self.note("RSS per 1,000 more resources", 1000 * (many - few) / len(names), "MiB", 25, "O2")

    async def _calm(self) -> None:
        """Until the operator asked the API server for nothing during a second."""
        seen, since = -1, time.monotonic()

        async def calm() -> bool:
            nonlocal seen, since
            now = (await self.operator.metrics("dsft_kubernetes_requests_total")).total()
            if now != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > 1.0

        await self.operator.until("at rest", calm, 60 + PER_RUN_SECONDS * len(self.watch.runs))

    async def _versions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in (RUNS, CLUSTERS):
            for item in await self.api.items(path.format(WATCHED)):
                found[item["metadata"]["uid"]] = item["metadata"]["resourceVersion"]
        return found


def numbered(word: str, count: int) -> list[str]:
    return [f"{word}-{number}" for number in range(max(0, count))]


def run(name: str, namespace: str) -> Json:
    return {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {"name": name, "namespace": namespace},
        "spec": SPEC,
    }


def ready_status() -> Json:
    """Of a RayCluster whose head and workers are up; the head is the bench's own."""
    workers = sum(pool["nodes"] for pool in SPEC["nodePools"])
    condition = {
        "type": "HeadPodReady",
        "status": "True",
        "reason": "HeadPodRunningAndReady",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    return {
        "state": "ready",
        "conditions": [condition],
        "head": {"podIP": "127.0.0.1"},
        "readyWorkerReplicas": workers,
        "desiredWorkerReplicas": workers,
    }


class RunningHead(FakeHead):
    """A head whose jobs run as soon as they are submitted, and never end."""

    def post(self, path: str, body: Json) -> tuple[int, str]:
        answer = super().post(path, body)
        if path.endswith("/jobs/"):
            self.jobs[body["submission_id"]] = "RUNNING"
        return answer

    def _move(self, submission: str) -> None:
        return


@contextmanager
def head_running() -> Iterator[tuple[FakeHead, int]]:
    head = RunningHead()
    port = head.start()
    try:
        yield head, port
    finally:
        head.stop()


async def measured(plane: ControlPlane, folder: Path, count: int) -> list[Figure]:
    user = f"system:serviceaccount:{NAMESPACE}:{NAME}"
    account = plane.kubeconfig("operator", user, ["system:serviceaccounts", "system:authenticated"])
    with head_running() as (head, port):
        options: Json = {"image": IMAGE, "intervals": INTERVALS, "ray": {"dashboardPort": port}}
        operator = OperatorProcess(folder / "operator", account, WATCHED, options)
        try:
            async with Api(plane.url, plane.admin) as api:
                bench = Bench(api, operator, head, count)
                await bench.measure()
                return bench.figures
        finally:
            operator.kill()


def main() -> int:
    """Measure, print the table, judge."""
    parser = argparse.ArgumentParser(prog="tests.bench.operator_scale", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="resources at once; five times as many for memory")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with scratch_folder("dsft-bench-operator-") as folder:
        print("starting etcd and the API server", file=sys.stderr, flush=True)
        plane = ControlPlane.start(folder / "plane")
        plane.install(*our_crds(), raycluster_crd())
        plane.kubectl("apply", f"--filename={ROOT / FILE}")
        try:
            figures = asyncio.run(measured(plane, folder, arguments.count))
        except KeyboardInterrupt:
            return 130
    if arguments.output == "json":
        print(json.dumps([{**asdict(figure), "met": figure.met} for figure in figures], indent=2))
    else:
        print("\n".join(map(str, figures)))
    return 1 if any(figure.met is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
