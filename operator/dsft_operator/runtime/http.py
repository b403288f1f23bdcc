"""/healthz, /readyz and /metrics on one port.

Healthy: the event loop turns, or there would be no answer. Ready: the watches run.
"""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest


def application(is_ready: Callable[[], bool]) -> web.Application:
    """The three endpoints."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer(good=True)

    async def readyz(_: web.Request) -> web.Response:
        return _answer(good=is_ready())

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _answer(*, good: bool) -> web.Response:
    return web.Response(text="ok\n" if good else "not ok\n", status=200 if good else 503)
