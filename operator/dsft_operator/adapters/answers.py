"""The API server's answers as values and errors of ours."""

# The kubernetes client is typed in part only.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

import json
from collections.abc import Awaitable
from typing import Any, TypeVar

import aiohttp
from kubernetes.aio.client.exceptions import ApiException

from dsft_operator.ports import Conflict, KubeError, Refused

# aiohttp's errors are OSErrors only in part: a connection that the server closes, as at its restart, is none.
SILENCE = (TimeoutError, OSError, aiohttp.ClientError)
# No right, or an admission policy: what it makes of the same request does not change by itself.
DEFINITE = (400, 403, 405, 422)
T = TypeVar("T")


class AlreadyExistsError(Conflict):
    """Something of that name is there. Other conflicts pass: a quota that changed meanwhile is one."""


async def done(call: Awaitable[T]) -> T:
    """The answer.

    Raises:
        Conflict: a precondition did not hold.
        KubeError: all else that went wrong.
    """
    try:
        return await call
    except ApiException as error:
        if error.status == 409:
            kind = AlreadyExistsError if _told(error, "reason") == "AlreadyExists" else Conflict
            raise kind(_words(error)) from error
        raise refused(error) from error
    except SILENCE as error:
        raise KubeError(f"the API server did not answer: {error!r}") from error


async def found(call: Awaitable[T]) -> T | None:
    """The answer; None if there is no such object. Raises KubeError."""
    try:
        return await call
    except ApiException as error:
        if error.status == 404:
            return None
        raise refused(error) from error
    except SILENCE as error:
        raise KubeError(f"the API server did not answer: {error!r}") from error


async def unless_there(call: Awaitable[Any]) -> None:
    """Make something, unless one of that name is there. Raises KubeError, and Conflict as a quota that changes answers it."""
    try:
        await done(call)
    except AlreadyExistsError:
        return


def refused(error: ApiException) -> KubeError:
    """An answer that is a refusal, in the API server's words."""
    return answered(error.status, _words(error))


def answered(status: int | None, words: str) -> KubeError:
    """An answer of this HTTP status that is none of those that were waited for."""
    kind = Refused if status in DEFINITE else KubeError
    return kind(f"the API server answered {status}: {words}")


def _words(error: ApiException) -> str:
    return _told(error, "message") or str(error.reason)


def _told(error: ApiException, field: str) -> str | None:
    """A field of the Status that the API server answers with."""
    try:
        return json.loads(error.body or "")[field]
    except (ValueError, KeyError, TypeError):
        return None
