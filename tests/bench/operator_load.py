"""What the operator's bench needs around the operator: an async client without limits, a stopwatch on watches, the process."""

import asyncio
import json
import os
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.processes import Process, free_ports

ROOT = Path(__file__).parents[2]
RUNS = "/apis/dsft.dev/v1alpha1/namespaces/{}/deepspeedfinetunes"
CLUSTERS = "/apis/ray.io/v1/namespaces/{}/rayclusters"
# What a run is made of on the API server; requests for anything else are not the operator's.
RESOURCES = ("deepspeedfinetunes", "rayclusters", "secrets", "networkpolicies", "events", "pods")
WRITES = ("POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION")
CONNECTIONS = 64
POLL_SECONDS = 0.05
Json = dict[str, Any]


class Api:
    """A bare client: one session, no limit, no retries."""

    def __init__(self, url: str, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        user = config["users"][0]["user"]
        tls = ssl.create_default_context(cafile=config["clusters"][0]["cluster"]["certificate-authority"])
        tls.load_cert_chain(user["client-certificate"], user["client-key"])
        connector = aiohttp.TCPConnector(ssl=tls, limit=0)
        self._session = aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=120))

    async def __aenter__(self) -> "Api":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, body: Json | None = None, *, kind: str = "application/json") -> Json:
        data = None if body is None else json.dumps(body)
        async with self._session.request(method, path, data=data, headers={"Content-Type": kind}) as answer:
            text = await answer.text()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path}: {answer.status}: {text[:500]}")
            return json.loads(text)

    async def apply_status(self, path: str, document: Json) -> Json:
        """Server-side, as the operator does it."""
        path = f"{path}/{document['metadata']['name']}/status?fieldManager=dsft-operator&force=true"
        return await self.send("PATCH", path, document, kind="application/apply-patch+yaml")

    async def items(self, path: str) -> list[Json]:
        return (await self.send("GET", path))["items"]

    async def watch(self, path: str, seen: Callable[[str, Json], None]) -> None:
        """Tell of each event from now on, until cancelled: none is lost where the server ends a watch and another begins."""
        version = (await self.send("GET", f"{path}?limit=1"))["metadata"]["resourceVersion"]
        timeout = aiohttp.ClientTimeout(total=None)
        while True:
            url = f"{path}?watch=1&resourceVersion={version}&timeoutSeconds=7200"
            async with self._session.get(url, timeout=timeout) as answer:
                answer.raise_for_status()
                buffer = b""
                async for chunk in answer.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            raise RuntimeError(f"the watch of {path} failed: {event['object']}")
                        version = event["object"]["metadata"]["resourceVersion"]
                        seen(event["type"], event["object"])

    async def requests(self) -> Counter[tuple[str, str]]:
        """Requests that the server has answered so far, by verb and resource: all clients' together."""
        async with self._session.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        wanted = [line for line in lines if line.startswith("apiserver_request_total{")]
        counted: Counter[tuple[str, str]] = Counter()
        for family in text_string_to_metric_families("# TYPE apiserver_request_total counter\n" + "\n".join(wanted)):
            for sample in family.samples:
                labels = sample.labels
                if labels["resource"] in RESOURCES and labels["verb"] not in ("WATCH", "CONNECT"):
                    name = "/".join(filter(None, (labels["resource"], labels["subresource"])))
                    counted[labels["verb"], name] += round(sample.value)
        return counted


@dataclass
class Timeline:
    """What happened to one run; seconds of the monotonic clock."""

    replied: float = 0.0
    cluster: float = 0.0
    ready: float = 0.0  # its RayCluster was about to be told ready
    told: float = 0.0  # the first status after that
    running: float = 0.0  # its job
    status: Json = field(default_factory=dict[str, Any])
    first_statuses: int = 0  # writes of a status that does not know the cluster's uid yet


class Stopwatch:
    """Follows runs and RayClusters of a namespace by watches."""

    def __init__(self) -> None:
        self.runs: dict[str, Timeline] = {}

    def run(self, name: str) -> Timeline:
        return self.runs.setdefault(name, Timeline())

    def on_run(self, kind: str, document: Json) -> None:
        line, status = self.run(document["metadata"]["name"]), document.get("status") or {}
        if kind == "MODIFIED" and status != line.status:
            now = time.monotonic()
            line.first_statuses += "uid" not in status.get("rayCluster", {})
            line.told = line.told or (now if line.ready else 0.0)
            if status.get("job", {}).get("state") == "RUNNING":
                line.running = line.running or now
        line.status = status

    def on_cluster(self, kind: str, document: Json) -> None:
        line = self.run(document["metadata"]["ownerReferences"][0]["name"])
        if kind == "ADDED" and not line.cluster:
            line.cluster = time.monotonic()

    def settled(self, names: Iterable[str]) -> bool:
        """Each run's RayCluster is there, prepared, and in the status."""
        return all(self.run(name).cluster and self.run(name).status.get("rayCluster", {}).get("uid") for name in names)

    def running(self, names: Iterable[str]) -> bool:
        return all(self.run(name).running for name in names)

    def delays(self, names: Iterable[str]) -> list[float]:
        """Seconds from the reply to the creation to the RayCluster's event."""
        return [self.run(name).cluster - self.run(name).replied for name in names]


@dataclass
class OperatorProcess:
    """`python -m dsft_operator` for one namespace, and what its /metrics and /proc say."""

    folder: Path
    kubeconfig: Path
    namespace: str
    options: Json
    process: Process | None = None
    port: int = 0

    def start(self) -> None:
        (self.port,) = free_ports(1)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.yaml"
        config = {
            "kind": "OperatorConfig",
            "watchNamespaces": [self.namespace],
            "client": {"qps": 0},
            "httpPort": self.port,
            **self.options,
        }
        file.write_text(yaml.safe_dump(config))
        env = {
            "KUBECONFIG": str(self.kubeconfig),
            "DSFT_CONFIG": str(file),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "operator"), str(ROOT / "trainer_image")]),
        }
        self.process = Process.start(self.folder, "operator", [sys.executable, "-m", "dsft_operator"], env=env)

    def stop(self) -> None:
        """SIGTERM, as a rollout does: it gives its Lease back. Nothing if it does not run."""
        if self.process is not None:
            self.process.stop()
            self.process = None

    def kill(self) -> None:
        """SIGKILL; nothing if it does not run."""
        if self.process is not None:
            self.process.kill()
            self.process = None

    @property
    def cpu(self) -> float:
        """CPU seconds so far."""
        times = self._proc.cpu_times()
        return times.user + times.system

    @property
    def mib(self) -> float:
        """Resident memory."""
        return self._proc.memory_info().rss / 2**20

    async def metrics(self, name: str) -> Counter[tuple[str, ...]]:
        """A metric's values by its labels' values; empty while it does not answer."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        found: Counter[tuple[str, ...]] = Counter()
        with suppress(aiohttp.ClientConnectionError):
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                for family in text_string_to_metric_families(await answer.text()):
                    for sample in family.samples:
                        if sample.name == name:
                            found[tuple(sample.labels.values())] += round(sample.value)
        return found

    async def observed(self) -> int:
        """How many different runs it has looked at since its start."""
        return (await self.metrics("dsft_runs")).total()

    async def until(self, what: str, fact: Callable[[], bool | Awaitable[bool]], seconds: float) -> float:
        """Wait for what it brings about; the seconds that took.

        Raises:
            RuntimeError: with the end of its log, if it ends or the time is over.
        """
        begin = time.monotonic()
        while True:
            found = fact()
            if found if isinstance(found, bool) else await found:
                return time.monotonic() - begin
            assert self.process is not None
            if not self.process.running or time.monotonic() - begin > seconds:
                raise RuntimeError(f"{what}: not within {seconds:.0f} s\n{self.process.log_tail()}")
            await asyncio.sleep(POLL_SECONDS)

    @property
    def _proc(self) -> psutil.Process:
        assert self.process is not None, "it runs"
        return psutil.Process(self.process.popen.pid)


async def at_once(names: Iterable[str], work: Callable[[str], Awaitable[None]], width: int) -> None:
    """Do this for each, `width` of them at the same time."""
    waiting = iter(names)

    async def lane() -> None:
        for name in waiting:
            await work(name)

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(lane())


def quantiles(values: list[float]) -> tuple[float, float]:
    """p50 and p99, in milliseconds."""
    ordered = sorted(values)
    worst = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return 1000 * statistics.median(ordered), 1000 * worst
