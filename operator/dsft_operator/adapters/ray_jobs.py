"""The Jobs API and the log folder of a Ray head, over HTTP (Ray 2.60; a job's driver runs where the dashboard is).

The head belongs to a tenant: replies are cut at MAX_BYTES, bounded in time, parsed strictly, and redirects are not
followed. Whatever it answers, what comes of it is an `Unknown` of this one run.
"""

import asyncio
import json
from datetime import UTC, datetime
from typing import Any, Literal

import aiohttp
from pydantic import BaseModel, ConfigDict, Field

from dsft_api.progress import PROGRESS_FILE, Progress
from dsft_operator.core.decision import SubmitJob
from dsft_operator.core.observed import Head, RayJob, Unknown
from dsft_operator.ports import RayError

MAX_BYTES = 2 * 2**20
# A few kilobytes are usual, and all of it may come into the status, for which etcd has 1.5 MiB.
MAX_PROGRESS = 2**18
# What Kubernetes keeps as an integer: a status with a larger one would be refused, again and again.
_MAX_INT = 2**63 - 1
# Sums of several stay finite.
_MAX_FLOAT = 1e100
# Ray answers 500 with a traceback; these are its words (dashboard/modules/job/job_manager.py).
_DUPLICATE = "already exists"
_DUPLICATE_REMEDY = "use a different submission_id"
# Of a log that is not there (dashboard/modules/log/log_agent.py).
NO_FILE = "file is not found"


class _Version(BaseModel):
    session_name: str = Field(max_length=256)
    ray_version: str = Field(max_length=64)


class _Job(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status: Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
    message: str | None = None
    error_type: str | None = None
    driver_exit_code: int | None = None
    end_time: float | None = None


class _Reply:
    """Status and text of an answer."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text


class RayJobsHttp:
    """`ports.RayJobs` over one aiohttp session."""

    def __init__(self, session: aiohttp.ClientSession, port: int, timeout_seconds: float) -> None:
        self._session = session
        self._port = port
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)

    async def head(self, address: str, token: str) -> Head | Unknown:
        reply = await self._ask("GET", address, token, "/api/version")
        if isinstance(reply, Unknown):
            return reply
        try:
            version = _Version.model_validate(_document(reply.text))
        except ValueError:
            return Unknown(f"/api/version answered {reply.status}: {reply.text[:200]}")
        return Head(session=version.session_name, ray_version=version.ray_version)

    async def job(self, address: str, token: str, submission_id: str) -> RayJob | Unknown | None:
        reply = await self._ask("GET", address, token, f"/api/jobs/{submission_id}")
        if isinstance(reply, Unknown):
            return reply
        if reply.status == 404:
            return None
        try:
            job = _Job.model_validate(_document(reply.text))
            return RayJob(
                submission_id=submission_id,
                state=job.status,
                message=(job.message or "")[-4000:],
                error_type=job.error_type,
                exit_code=job.driver_exit_code,
                ended=datetime.fromtimestamp(job.end_time / 1000, UTC) if job.end_time else None,
            )
        except (ValueError, OverflowError, OSError):
            return Unknown(f"/api/jobs answered {reply.status}: {reply.text[:200]}")

    async def submit(self, address: str, token: str, job: SubmitJob) -> None:
        body = {
            "entrypoint": job.entrypoint,
            "submission_id": job.submission_id,
            "runtime_env": {"env_vars": job.environment},
            "metadata": job.metadata,
        }
        reply = await self._ask("POST", address, token, "/api/jobs/", body)
        if isinstance(reply, Unknown):
            raise RayError(reply.reason)
        if reply.status == 200 or (_DUPLICATE in reply.text and _DUPLICATE_REMEDY in reply.text):
            return
        raise RayError(f"the submission was answered {reply.status}: {reply.text[-500:]}")

    async def stop(self, address: str, token: str, submission_id: str) -> None:
        reply = await self._ask("POST", address, token, f"/api/jobs/{submission_id}/stop")
        if isinstance(reply, Unknown):
            raise RayError(reply.reason)

    async def progress(self, address: str, token: str) -> Progress | Unknown | None:
        nodes = await self._ask("GET", address, token, "/api/v0/nodes?limit=2000")
        if isinstance(nodes, Unknown):
            return nodes
        head = _head_node(nodes.text)
        if head is None:
            return Unknown(f"Ray named no head node: {nodes.text[:200]}")
        query = f"/api/v0/logs/file?node_id={head}&filename={PROGRESS_FILE}&lines=-1"
        reply = await self._ask("GET", address, token, query)
        if isinstance(reply, Unknown):
            return reply
        if reply.status != 200:
            # Ray answers 500 whatever was wrong, so it is the words that say whether there is no such file.
            if reply.status == 404 or NO_FILE in reply.text:
                return None
            return Unknown(f"the progress document was answered {reply.status}: {reply.text[:200]}")
        if len(reply.text) > MAX_PROGRESS:
            return Unknown(f"the progress document has {len(reply.text)} characters, and {MAX_PROGRESS} is the most")
        try:
            return Progress.model_validate(_document(reply.text[reply.text.index("{") :]))
        except ValueError:
            return None if not reply.text.strip("\x00\x01 \n") else Unknown(f"no progress document: {reply.text[:200]}")

    async def _ask(
        self, method: str, address: str, token: str, path: str, body: dict[str, Any] | None = None
    ) -> _Reply | Unknown:
        url = f"http://{address}:{self._port}{path}"
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with self._session.request(
                method, url, json=body, headers=headers, timeout=self._timeout, allow_redirects=False
            ) as response:
                content = await response.content.read(MAX_BYTES + 1)
                while len(content) <= MAX_BYTES and (more := await response.content.read(MAX_BYTES + 1 - len(content))):
                    content += more
        except (TimeoutError, aiohttp.ClientError, asyncio.IncompleteReadError, ValueError) as error:
            return Unknown(f"{path.partition('?')[0]}: {type(error).__name__}: {error}"[:300])
        if len(content) > MAX_BYTES:
            return Unknown(f"{path.partition('?')[0]}: the answer is larger than {MAX_BYTES} bytes")
        if response.status in (401, 403):
            return Unknown(f"the Ray head refused our token ({response.status})")
        return _Reply(response.status, content.decode(errors="replace"))


def _head_node(text: str) -> str | None:
    """The hex id of the head among `/api/v0/nodes`."""
    try:
        rows = _document(text)["data"]["result"]["result"]
        ids = [row["node_id"] for row in rows if row.get("is_head_node") and row.get("state") == "ALIVE"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((node for node in ids if isinstance(node, str) and node.isalnum()), None)


def _document(text: str) -> Any:
    """JSON with numbers that Kubernetes can keep.

    Raises:
        ValueError: if it is none.
    """
    try:
        return json.loads(text, parse_int=_bounded, parse_float=_finite, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _bounded(digits: str) -> int:
    number = int(digits)
    if abs(number) > _MAX_INT:
        raise ValueError(f"{digits[:20]}... is no number of 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if abs(number) > _MAX_FLOAT:
        raise ValueError(f"{digits[:20]} is too large")
    return number


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
