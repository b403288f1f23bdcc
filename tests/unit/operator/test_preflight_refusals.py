"""A preflight's Job that may not be read or deleted, and what a new token makes of what was found."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client

from dsft_api.conditions import ConditionType, Phase, Reason
from dsft_api.preflight import PreflightResult
from dsft_operator.adapters.kube import KubeApi
from dsft_operator.core.observed import Observed, Unknown
from dsft_operator.core.preflight_job import SECONDS
from dsft_operator.ports import KubeError, Refused
from tests.unit.operator.settling import settle
from tests.unit.operator.situations import CONFIG, after, begin, edited, names
from tests.unit.operator.test_preflight import FOUND, LOOKS, looked_at, name_of, reason_of
from tests.unit.operator.world import KEY, World

Json = dict[str, Any]
NO_RIGHT = 'the API server answered 403: jobs.batch "chat" is forbidden: cannot get resource "jobs"'
UNREAD = Unknown(NO_RIGHT)


# --- what the API server answers

CALLS: dict[str, Callable[[KubeApi], Awaitable[object]]] = {
    "read": lambda kube: kube.preflight(KEY, "chat-p", "uid"),
    "delete": lambda kube: kube.delete_job(KEY, "chat-p", "uid"),
}


@pytest.mark.parametrize(
    ("status", "is_definite"), [(403, True), (422, True), (401, False), (429, False), (500, False)]
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_right_is_told_from_a_server_that_is_not_well(
    call: Callable[[KubeApi], Awaitable[object]], status: int, is_definite: bool
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"kind": "Status", "message": "jobs.batch is forbidden"}, status=status)

    async def ask() -> None:
        app = web.Application()
        app.router.add_route("*", "/apis/batch/v1/namespaces/ml/jobs/chat-p", answer)
        async with TestServer(app) as server, client.ApiClient(client.Configuration()) as api:
            api.configuration.host = str(server.make_url("")).rstrip("/")
            await call(KubeApi(api, CONFIG))

    with pytest.raises(KubeError, match=f"answered {status}: jobs.batch is forbidden") as caught:
        asyncio.run(ask())
    assert isinstance(caught.value, Refused) is is_definite


# --- a Job that may not be read


def test_a_job_that_may_not_be_read_is_told_and_holds_the_run_for_a_time_only() -> None:
    """An operator that was upgraded without its roles."""
    seen, decision = after(replace(begin(LOOKS), preflight=UNREAD))
    assert names(decision) == []
    assert reason_of(decision, ConditionType.CLUSTER_READY) == ("False", Reason.CLUSTER_REFUSED)
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("Unknown", Reason.PREFLIGHT)
    assert f"Job {name_of()} cannot be read: {NO_RIGHT}" in str(seen.run.status.message)
    seen, decision = after(seen, seconds=SECONDS - 1)
    assert (names(decision), seen.run.status.phase) == ([], Phase.PROVISIONING)
    seen, decision = after(seen, seconds=SECONDS)
    assert reason_of(decision, ConditionType.PREFLIGHTED) == ("Unknown", Reason.PREFLIGHT_INCOMPLETE)
    assert NO_RIGHT in str(seen.run.status.message)
    assert names(after(seen, seconds=SECONDS)[1]) == ["AddFinalizer", "CreateCluster"]


def test_the_right_comes_while_it_waits() -> None:
    seen, _ = after(replace(begin(LOOKS), preflight=UNREAD))
    _, decision = after(replace(seen, preflight=None), seconds=100)
    assert names(decision) == ["AddFinalizer", "CreateJob"]


@pytest.mark.parametrize(
    ("spec", "phase"),
    [({"suspend": True}, Phase.SUSPENDED), ({"nodePools": []}, Phase.FAILED)],
    ids=["suspended", "not valid any more"],
)
def test_where_nobody_waits_for_it_nothing_is_held_up(spec: Json, phase: Phase) -> None:
    seen, _ = after(replace(begin(LOOKS), preflight=UNREAD))
    seen, decision = after(edited(seen, {**LOOKS, **spec}))
    assert (names(decision), seen.run.status.phase) == ([], phase)


def test_switched_off_it_is_gone_from_the_status() -> None:
    """The way past it for whoever cannot have the role mended."""
    seen, _ = after(replace(begin(LOOKS), preflight=UNREAD))
    seen = edited(seen, {"preflight": {"enabled": False}})
    seen, _ = after(seen)
    seen, _ = after(seen)
    seen, decision = after(seen)
    assert names(decision) == ["AddFinalizer", "CreateCluster"]
    assert reason_of(decision, ConditionType.PREFLIGHTED) is None
    assert seen.run.status.preflight is None


# --- a Job that may not be deleted


@pytest.mark.parametrize("spec", [{}, {"queue": {"name": "team-a"}}], ids=["at once", "queued"])
def test_a_job_that_may_not_be_deleted_holds_nothing_up(spec: Json) -> None:
    world = World({**LOOKS, **spec}, refused={"delete Job": NO_RIGHT}, generous=True)
    settle(world)
    assert world.seen_status.phase is Phase.SUCCEEDED
    assert (world.made, len(world.jobs)) == (1, 1), "Kubernetes takes the Job away an hour later"


def test_a_job_that_a_late_read_had_missed_goes_right_before_the_cluster_comes() -> None:
    seen, _ = after(looked_at(result=PreflightResult(run_uid=begin().run.uid)))
    _, decision = after(seen)
    assert names(decision) == ["AddFinalizer", "DeleteJob", "CreateCluster"]


# --- another token


def revived(token: str) -> Observed:
    """Something was found, and the token is new."""
    seen, _ = after(looked_at(result=FOUND))
    seen, _ = after(edited(replace(seen, preflight=None), {**LOOKS, "retry": {"token": token}}))
    assert seen.run.status.retry_token == token
    return seen


@pytest.mark.parametrize("is_written", [True, False], ids=["begun", "begun by an operator that died"])
def test_what_is_found_under_a_token_is_not_revived_by_it(*, is_written: bool) -> None:
    """It was set while the look under another one was under way."""
    three = {**LOOKS, "retry": {"token": "3"}}
    seen = edited(revived("2"), three)
    begun, decision = after(seen)
    assert names(decision) == ["AddFinalizer", "CreateJob"]
    job = looked_at({"retry": {"token": "3"}}, result=FOUND).preflight
    seen, decision = after(replace(begun if is_written else seen, preflight=job))
    assert (seen.run.status.phase, seen.run.status.retry_token) == (Phase.FAILED, "3")
    seen, decision = after(replace(seen, preflight=None))
    assert (names(decision), seen.run.status.phase) == ([], Phase.FAILED)


def test_a_token_that_is_put_back_is_looked_at_again() -> None:
    """By a GitOps tool, say: what was found under it stands in the way of a RayCluster still."""
    seen, _ = after(looked_at(result=FOUND))
    seen, _ = after(edited(replace(seen, preflight=None), {**LOOKS, "retry": {"token": "2"}}))
    _, decision = after(edited(seen, LOOKS))
    assert names(decision) == ["AddFinalizer", "CreateJob"]


def test_what_was_found_is_not_told_of_a_run_that_is_not_looked_at() -> None:
    seen, _ = after(looked_at(result=FOUND))
    seen = edited(replace(seen, preflight=None), {"preflight": {"enabled": False}, "retry": {"token": "2"}})
    seen, _ = after(seen)
    _, decision = after(seen)
    assert names(decision) == ["AddFinalizer", "CreateCluster"]
    assert reason_of(decision, ConditionType.PREFLIGHTED) is None
