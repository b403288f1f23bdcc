"""/healthz, /readyz and /metrics on one port. What is wrong stands in the answer, for whoever asks by hand.

A container that is not healthy should be started again; one that is not ready yet is left alone.
"""

from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest


def application(ailments: Callable[[], Iterable[str]], obstacles: Callable[[], Iterable[str]]) -> web.Application:
    """The three endpoints, from what is wrong (unhealthy) and what is still to come (not ready)."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer(ailments())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(obstacles())

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _answer(problems: Iterable[str]) -> web.Response:
    text = "".join(f"{problem}\n" for problem in problems)
    return web.Response(text=text or "ok\n", status=503 if text else 200)
