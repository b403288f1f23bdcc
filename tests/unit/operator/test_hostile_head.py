"""A Ray head that is a tenant's answers what it likes: nothing of it is more than one run that cannot be read."""

import asyncio
import json
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from dsft_api.progress import Progress, TrainerPhase
from dsft_operator.adapters import ray_jobs
from dsft_operator.adapters.ray_jobs import MAX_BYTES, RayJobsHttp
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.observed import Head, RayJob, Unknown
from dsft_operator.ports import RayError

SECONDS = 1.0
NODES = {"data": {"result": {"result": [{"node_id": "ab", "is_head_node": True, "state": "ALIVE"}]}}}
PROGRESS = Progress(
    seq=1, run_uid="u", attempt=1, phase=TrainerPhase.TRAINING, updated_at=datetime(2026, 1, 1, tzinfo=UTC)
).model_dump(mode="json", by_alias=True)

# What is sent, for any request.
ANSWERS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"<html>",
    "no text": b"\xff\xfe\x00",
    "too much": b" " * (MAX_BYTES + 2),
    "nested": b"[" * 200_000,
    "nested in place": b'{"data": {"result": {"result": ' + b"[" * 200_000,
    "another type": b'{"status": 1, "session_name": [], "data": []}',
    "a list": b"[1]",
    "a long number": b'{"status": "FAILED", "end_time": ' + b"9" * 4000 + b"}",
    "a longer number": b'{"status": "FAILED", "end_time": ' + b"9" * 10_000 + b"}",
    "a time that is none": b'{"status": "FAILED", "end_time": 1e300}',
    "a number that is none": b'{"status": "FAILED", "end_time": NaN}',
    "a step that Kubernetes cannot keep": json.dumps({**PROGRESS, "seq": 2**70}).encode(),
    "a time without a zone": json.dumps({**PROGRESS, "updatedAt": "2026-01-01T00:00:00"}).encode(),
    "a time before all others": json.dumps({**PROGRESS, "updatedAt": "0001-01-01T00:00:00+14:00"}).encode(),
    "a sum that is infinite": json.dumps({**PROGRESS, "gradNorm": 1e308}).encode(),
    "a status that etcd cannot keep": json.dumps({**PROGRESS, "unknown": "x" * 10**6}).encode(),
    "rows that are none": b'{"data": {"result": {"result": [1, null, "x"]}}}',
    "a node that is a path": json.dumps(
        {"data": {"result": {"result": [{"node_id": "../../x", "is_head_node": True, "state": "ALIVE"}]}}}
    ).encode(),
    "a long session": json.dumps({"session_name": "s" * 300, "ray_version": "2"}).encode(),
}


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def head_that(handler: Handler) -> AsyncIterator[RayJobsHttp]:
    """Questions to a head that answers each of them by `handler`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield RayJobsHttp(session, runner.addresses[0][1], SECONDS)
    finally:
        await runner.cleanup()


async def asked(handler: Handler) -> tuple[object, object, object, float]:
    """What the operator makes of such a head, and the longest of its requests in seconds."""
    told: list[object] = []
    longest = 0.0
    async with head_that(handler) as head:
        for question in (head.head("127.0.0.1", "t"), head.job("127.0.0.1", "t", "a"), head.progress("127.0.0.1", "t")):
            began = time.monotonic()
            told.append(await question)
            longest = max(longest, time.monotonic() - began)
        with pytest.raises(RayError):
            await head.submit("127.0.0.1", "t", SubmitJob("a", "x", {}, {}))
    return told[0], told[1], told[2], longest


async def asked_for_progress(answer: bytes) -> object:
    """What is made of a progress document, where the head is well otherwise."""

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(NODES) if request.path.endswith("nodes") else web.Response(body=answer)

    async with head_that(handler) as head:
        return await head.progress("127.0.0.1", "t")


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_read(name: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=ANSWERS[name], status=500 if name == "nothing" else 201)

    head, job, progress, _ = asyncio.run(asked(handler))
    assert isinstance(head, Unknown)
    assert isinstance(job, Unknown)
    assert isinstance(progress, Unknown | None)
    assert isinstance(asyncio.run(asked_for_progress(ANSWERS[name])), Unknown | None)
    assert len(str(head)) + len(str(job)) + len(str(progress)) < 2000


@pytest.mark.parametrize(
    ("status", "text", "missing"),
    [
        (404, "404: Not Found", True),
        (500, "A file is not found at: dsft-progress.json", True),
        (500, "Failed to query the data source. Either there's a network issue, or the source is down.", False),
        (503, "", False),
    ],
)
def test_a_document_that_is_not_there_is_told_from_one_that_cannot_be_had(
    status: int, text: str, *, missing: bool
) -> None:
    async def handler(request: web.Request) -> web.Response:
        is_nodes = request.path.endswith("nodes")
        return web.json_response(NODES) if is_nodes else web.Response(text=text, status=status)

    async def ask() -> object:
        async with head_that(handler) as head:
            return await head.progress("127.0.0.1", "t")

    told = asyncio.run(ask())
    assert told is None if missing else isinstance(told, Unknown)


def test_rays_own_words_for_a_missing_log_are_the_ones_that_are_known(tmp_path: Path) -> None:
    """By the agent of the installed Ray, which looks for the file."""
    from ray.dashboard.modules.log.log_agent import LogAgentV1Grpc

    with pytest.raises(FileNotFoundError, match=ray_jobs.NO_FILE):
        LogAgentV1Grpc._resolve_filename(tmp_path, "dsft-progress.json")


def test_bytes_that_never_end() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 2**16)

    head, *_, longest = asyncio.run(asked(handler))
    assert isinstance(head, Unknown)
    assert longest < 10 * SECONDS


def test_bytes_that_come_one_by_one() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for byte in _dripping():
            await response.write(byte)
        return response

    head, *_, longest = asyncio.run(asked(handler))
    assert isinstance(head, Unknown)
    assert longest < 10 * SECONDS


async def _dripping() -> AsyncIterator[bytes]:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


def test_a_kilobyte_that_is_a_gigabyte() -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(b" " * 2**20) for _ in range(256)) + packer.flush()
    assert len(bomb) < MAX_BYTES

    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"}, status=201)

    tracemalloc.start()
    head, *_ = asyncio.run(asked(handler))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(head, Unknown)
    assert peak < 32 * 2**20


def test_another_address_is_not_asked() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(status=302, headers={"Location": f"http://{request.host}/elsewhere"}, text="{}")

    head, *_ = asyncio.run(asked(handler))
    assert isinstance(head, Unknown)
    assert "/elsewhere" not in seen


def test_a_head_that_is_well_is_read() -> None:
    """So that what the others refuse is not refused for all."""
    job = {"status": "FAILED", "message": "x" * 10_000, "end_time": 1767268800000}

    async def handler(request: web.Request) -> web.Response:
        answers = {
            "version": {"session_name": "s", "ray_version": "2.60.0"},
            "a": job,
            "nodes": NODES,
            "file": PROGRESS,
        }
        return web.json_response(
            answers.get(request.path.rpartition("/")[2], {}), status=200 if request.method == "GET" else 500
        )

    head, told, progress, _ = asyncio.run(asked(handler))
    assert head == Head("s", "2.60.0")
    assert isinstance(told, RayJob)
    assert (told.state, len(told.message), told.ended) == ("FAILED", 4000, datetime(2026, 1, 1, 12, tzinfo=UTC))
    assert isinstance(progress, Progress)
