"""The bound on requests to the API server, on a real server of aiohttp and by the clock of the loop."""

import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dsft_operator.adapters.kube_requests import REQUESTS, bounded
from dsft_operator.config import ClientLimits


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
