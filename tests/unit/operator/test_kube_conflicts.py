"""What 409 means to a creation: the object is there, or something else changed meanwhile and it has to be tried again."""

import asyncio
import json

import pytest
from kubernetes.aio import client

from dsft_operator.adapters.kube import KubeApi
from dsft_operator.ports import Conflict
from tests.unit.operator.situations import CONFIG

POLICY = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "chat-1", "namespace": "ml"},
    "spec": {"podSelector": {}},
}


def create(reason: str, message: str) -> None:
    """Ask for a NetworkPolicy where the API server answers 409 for this reason."""
    status = json.dumps({"kind": "Status", "code": 409, "reason": reason, "message": message})
    head = f"HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: {len(status)}\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}{status}".encode())
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with client.ApiClient(client.Configuration(host=host)) as api:
                await KubeApi(api, CONFIG).create(POLICY)

    asyncio.run(ask())


def test_what_is_there_already_is_no_failure() -> None:
    create("AlreadyExists", 'networkpolicies.networking.k8s.io "chat-1" already exists')


def test_a_quota_that_changed_meanwhile_is_told_so_that_it_is_tried_again() -> None:
    with pytest.raises(Conflict, match="Operation cannot be fulfilled on resourcequotas"):
        create("Conflict", 'Operation cannot be fulfilled on resourcequotas "all": the object has been modified')
