"""How many requests go to the API server: bounded, since it is everybody's, and counted by verb and answer.

A hook of aiohttp, so that no call can miss it. Kopf's watches have a client of their own and are few.
"""

from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiolimiter import AsyncLimiter
from prometheus_client import Counter

from dsft_operator.config import ClientLimits

REQUESTS = Counter(
    "dsft_kubernetes_requests_total", "Requests to the API server, by verb and status.", ["verb", "code"]
)


def bounded(limits: ClientLimits) -> aiohttp.TraceConfig:
    """A trace for the client's session that lets `qps` requests per second pass, and `burst` at once after a calm."""
    limiter = AsyncLimiter(limits.burst, limits.burst / limits.qps) if limits.qps else None
    trace = aiohttp.TraceConfig()

    async def wait(_: aiohttp.ClientSession, __: SimpleNamespace, ___: aiohttp.TraceRequestStartParams) -> None:
        if limiter is not None:
            await limiter.acquire()

    async def answered(_: aiohttp.ClientSession, __: SimpleNamespace, answer: aiohttp.TraceRequestEndParams) -> None:
        REQUESTS.labels(answer.method, str(answer.response.status)).inc()

    async def failed(
        _: aiohttp.ClientSession, __: SimpleNamespace, failure: aiohttp.TraceRequestExceptionParams
    ) -> None:
        REQUESTS.labels(failure.method, "none").inc()

    trace.on_request_start.append(wait)
    trace.on_request_end.append(answered)
    trace.on_request_exception.append(failed)
    return trace


def environment_proxy(url: str) -> str | None:
    """The proxy that HTTPS_PROXY and the like name for `url`, unless NO_PROXY excepts it."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
