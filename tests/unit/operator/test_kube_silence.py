"""An API server that closes the connection instead of answering, as at its restart: a failure that is told, and no other."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from kubernetes.aio import client

from dsft_operator.adapters.kube import KubeApi
from dsft_operator.ports import Key, KubeError
from tests.unit.operator.situations import CONFIG, begin

KEY = Key("ml", "chat")
CALLS: dict[str, Callable[[KubeApi], Awaitable[object]]] = {
    "run": lambda kube: kube.run(KEY),
    "runs": lambda kube: kube.runs(),
    "cluster": lambda kube: kube.cluster(KEY, "chat-1", "uid"),
    "preflight": lambda kube: kube.preflight(KEY, "chat-p", "uid"),
    "pods": lambda kube: kube.pods(KEY, "chat-1"),
    "queueing": lambda kube: kube.queueing(KEY, "uid"),
    "delete": lambda kube: kube.delete_cluster(KEY, "chat-1", "uid"),
    "delete a Job": lambda kube: kube.delete_job(KEY, "chat-p", "uid"),
    "status": lambda kube: kube.apply_status(begin().run, begin().run.status, "1"),
}
ANSWERS = {"closed": b"", "cut": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_connection_that_ends_is_a_kube_error(call: Callable[[KubeApi], Awaitable[object]], answer: bytes) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with client.ApiClient(client.Configuration(host=host)) as api:
                with pytest.raises(KubeError, match="did not answer"):
                    await call(KubeApi(api, CONFIG))

    asyncio.run(ask())
