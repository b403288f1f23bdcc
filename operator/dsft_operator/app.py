"""Wiring: clients, queue, workers, watches, health; started together, ended together."""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

import asyncio
import logging
import os
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from uuid import uuid4

import aiohttp
from aiohttp import web
from kubernetes.aio import client
from kubernetes.aio import config as kube_config
from prometheus_client import REGISTRY, Gauge

from dsft_operator.adapters.kube import KubeApi
from dsft_operator.adapters.kube_requests import bounded, environment_proxy
from dsft_operator.adapters.leases import KubeLeases
from dsft_operator.adapters.ray_jobs import RayJobsHttp
from dsft_operator.config import ClientLimits, OperatorConfig
from dsft_operator.ports import Key, KubeError, KubeRayMissing
from dsft_operator.runtime.health import Health
from dsft_operator.runtime.http import application
from dsft_operator.runtime.kopf_bridge import EventSource
from dsft_operator.runtime.leader import LEADER, Elector
from dsft_operator.runtime.reconciler import Reconciler
from dsft_operator.runtime.workers import resync, work
from dsft_operator.runtime.workqueue import WorkQueue

log = logging.getLogger(__name__)

KUBERAY_PROBE_SECONDS = 15.0
DEPTH = Gauge("dsft_queue_depth", "Runs waiting to be looked at.")


class SystemClock:
    """The machine's time."""

    def now(self) -> datetime:
        """UTC, whole seconds: what the status can say."""
        return datetime.now(UTC).replace(microsecond=0)


async def run(config: OperatorConfig) -> None:
    """Be the operator until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(client.ApiClient(await kube_configuration(config)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        kube = KubeApi(api, config)
        queue = WorkQueue()
        # Of its own: renewals must not stand in line behind the workers' requests.
        unbounded = config.model_copy(update={"client": ClientLimits(qps=0)})
        leases_api = await stack.enter_async_context(client.ApiClient(await kube_configuration(unbounded)))
        elector = _elector(leases_api, config)
        may_act = elector.leads if elector else lambda: True
        LEADER.set_function(may_act)
        ray = RayJobsHttp(session, config.ray.dashboard_port, config.ray.request_timeout_seconds)
        # What a standby keeps ready is nobody's work yet.
        DEPTH.set_function(lambda: len(queue) if may_act() else 0)
        reconciler = Reconciler(kube, ray, SystemClock(), config, may_act=may_act)
        REGISTRY.register(reconciler.metrics)
        health = Health(config.intervals.resync_seconds)
        watches = Watches(config, queue, kube, health, reconciler)
        await stack.enter_async_context(_Server(application(health.problems, watches.obstacles), config.http_port))
        chance = random.Random()  # noqa: S311  jitter, no secret
        tasks = [
            asyncio.create_task(act(elector, queue, reconciler, config.workers), name="workers"),
            asyncio.create_task(
                resync(queue, kube, health, reconciler, config.intervals.resync_seconds, chance), name="resync"
            ),
            asyncio.create_task(health.beat(), name="heart"),
            asyncio.create_task(watches.run(), name="watches"),
        ]
        stop = asyncio.create_task(stopped.wait())
        done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done - {stop}:
            task.result()  # raises what ended it, if it was no signal
        log.info("stopped")


def _elector(api: client.ApiClient, config: OperatorConfig) -> Elector | None:
    settings = config.leader_election
    if not settings.enabled:
        return None
    leases = KubeLeases(api, config.namespace, settings.lease_name, settings.renew_seconds)
    # A container that is started again in its pod is alone by that name, and need not wait for its own Lease's end.
    identity = os.environ.get("POD_NAME") or f"{socket.gethostname()}_{uuid4()}"
    return Elector(leases, identity, settings)


async def act(elector: Elector | None, queue: WorkQueue, reconciler: Reconciler, workers: int) -> None:
    """Work on the queue while this replica leads, until cancelled. The watches fill it meanwhile: a standby is warm."""
    while True:
        tasks: list[asyncio.Task[None]] = []
        try:
            if elector is not None:
                await elector.acquire()
                tasks.append(asyncio.create_task(elector.keep(), name="leader"))
            log.info("started", extra={"workers": workers})
            queue.begin()
            tasks += [asyncio.create_task(work(queue, reconciler), name=f"worker-{n}") for n in range(workers)]
            over, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # A pass that found its time over has left its run; and who leads again sees all of them anew.
            for key in tuple(reconciler.known):
                queue.add(key)
            reconciler.forget()
            if elector is not None:
                await elector.release()
        for task in over:
            task.result()  # raises what ended it, if it was not the Lease


class Watches:
    """The event source, begun anew when KubeRay's API comes or goes."""

    def __init__(
        self, config: OperatorConfig, queue: WorkQueue, kube: KubeApi, health: Health, reconciler: Reconciler
    ) -> None:
        self._config = config
        self._queue = queue
        self._kube = kube
        self._health = health
        self._reconciler = reconciler
        self._source: EventSource | None = None

    def obstacles(self) -> Iterator[str]:
        """Why events are not watched for, if so."""
        if self._source is None or not self._source.is_watching:
            yield "the watches are not up"

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            installed = await self._has_kuberay()
            if not installed:
                log.warning("KubeRay is not installed: waiting for its API")
            note = self._reconciler.note
            self._source = EventSource(self._config, self._queue, self._health, note, with_kuberay=installed)
            task = asyncio.create_task(self._source.run())
            try:
                while await self._has_kuberay() == installed:
                    if (await asyncio.wait([task], timeout=KUBERAY_PROBE_SECONDS))[0]:
                        raise RuntimeError("the watches ended") from task.exception()
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            log.info("KubeRay's API came or went: watching anew")

    async def _has_kuberay(self) -> bool:
        namespace = (self._config.watch_namespaces or ("default",))[0]
        while True:
            try:
                await self._kube.cluster(Key(namespace, "dsft-probe"), "dsft-probe", "")
            except KubeRayMissing:
                return False
            except KubeError as error:
                log.warning("the API server cannot be asked for RayClusters: %s", error)
                await asyncio.sleep(KUBERAY_PROBE_SECONDS)
                continue
            return True


class _Server:
    """The HTTP server as a context."""

    def __init__(self, app: web.Application, port: int) -> None:
        self._runner = web.AppRunner(app, access_log=None)
        self._port = port

    async def __aenter__(self) -> None:
        await self._runner.setup()
        site = web.SockSite(self._runner, _listening(self._port))
        await site.start()
        log.info("serving", extra={"url": site.name})

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


def _listening(port: int) -> socket.socket:
    """On all addresses, of both families where there are two: one socket, so that port 0 is one port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


async def kube_configuration(config: OperatorConfig) -> client.Configuration:
    """How the API server is reached: as a pod, else by the kubeconfig."""
    configuration = client.Configuration()
    configuration.trace_configs = [bounded(config.client)]
    await kube_config.load_config(client_configuration=configuration)
    configuration.proxy = configuration.proxy or environment_proxy(configuration.host)
    # Else aiohttp looks for a proxy and a .netrc file before each request, in a thread.
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration
