"""The bound on requests to the API server, on a real server of aiohttp and by the clock of the loop."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio.client import ApiClient

from dsft_operator.adapters.kube_requests import REQUESTS, bounded, environment_proxy
from dsft_operator.app import kube_configuration
from dsft_operator.config import ClientLimits, OperatorConfig


async def _ask(limits: ClientLimits, count: int) -> float:
    """Seconds that `count` requests at once take."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/", answer)
    async with (
        TestServer(app) as server,
        aiohttp.ClientSession(trace_configs=[bounded(limits)]) as session,
    ):
        loop = asyncio.get_running_loop()
        began = loop.time()
        replies = await asyncio.gather(*(session.get(server.make_url("/")) for _ in range(count)))
        for reply in replies:
            reply.release()
        return loop.time() - began


@pytest.mark.parametrize(("qps", "shortest"), [(20, 0.5), (0, 0.0)])
def test_what_exceeds_the_burst_waits(qps: float, shortest: float) -> None:
    """Ten at once, and ten more at 20 per second: half a second at least. A lower bound only, since machines are slow."""
    before = REQUESTS.labels("GET", "200")._value.get()
    assert asyncio.run(_ask(ClientLimits(qps=qps, burst=10), 20)) >= shortest * 0.9
    assert REQUESTS.labels("GET", "200")._value.get() == before + 20


@pytest.mark.parametrize(
    ("no_proxy", "proxy"),
    [("", "http://proxy.test:3128"), ("other.test", "http://proxy.test:3128"), (".cluster.test", None), ("*", None)],
)
def test_the_proxy_of_the_environment_is_kept(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, proxy: str | None
) -> None:
    for name in ("HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert environment_proxy("https://api.cluster.test:6443") == proxy


def test_the_environment_is_not_read_before_each_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(
        yaml.safe_dump(
            {
                "clusters": [{"name": "c", "cluster": {"server": "https://api.cluster.test:6443"}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "c",
            }
        )
    )
    for name in ("HTTPS_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    # KUBECONFIG is read when the client is imported.
    for module in ("kubernetes.aio.config", "kubernetes.aio.config.kube_config"):
        monkeypatch.setattr(f"{module}.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    monkeypatch.setenv("https_proxy", "http://proxy.test:3128")

    async def session() -> tuple[bool, str | None]:
        async with ApiClient(await kube_configuration(OperatorConfig())) as api:
            rest = api.rest_client
            made = rest._create_pool_manager()
            await made.close()
            return made.trust_env, rest.proxy

    assert asyncio.run(session()) == (False, "http://proxy.test:3128")
