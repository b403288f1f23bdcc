"""Kueue's Workloads over HTTP: how often they are listed, and what an older or a silent Kueue leaves untold."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from aiohttp import web
from kubernetes.aio import client

from dsft_api.conditions import Reason
from dsft_operator.adapters import workloads
from dsft_operator.adapters.kueue import JOB_UID_LABEL
from dsft_operator.adapters.workloads import Workloads
from dsft_operator.ports import KubeError
from tests.unit.operator.test_queues import workload

Json = dict[str, Any]
T = TypeVar("T")


@dataclass
class Server:
    """An API server with these Workloads, by the uids of their RayClusters. `asked`: the selectors, in order."""

    waiting: dict[str, Json]
    served: tuple[str, ...] = ("v1beta2",)
    selects_fields: bool = True
    continued: bool = False
    refuses: bool = False
    asked: list[str] = field(default_factory=list[str])

    async def answer(self, request: web.Request) -> web.Response:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        self.asked.append(labels or fields)
        if request.match_info["version"] not in self.served:
            return web.Response(status=404, text="404 page not found")
        if self.refuses:
            return web.json_response({"message": "workloads is forbidden"}, status=403)
        if labels:
            return web.json_response(
                {"metadata": {}, "items": [self.waiting[labels.removeprefix(f"{JOB_UID_LABEL}=")]]}
            )
        if not self.selects_fields:
            return web.json_response({"message": "field label not supported"}, status=400)
        rest = {"continue": "more"} if self.continued else {}
        return web.json_response({"metadata": rest, "items": list(self.waiting.values())})

    @property
    def lines(self) -> int:
        """How often all that wait were listed."""
        return sum(not asked.startswith(JOB_UID_LABEL) for asked in self.asked)

    def ask(self, question: Callable[[Workloads], Awaitable[T]]) -> T:
        async def asked() -> T:
            app = web.Application()
            app.router.add_get("/apis/kueue.x-k8s.io/{version}/namespaces/ml/workloads", self.answer)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                async with client.ApiClient(client.Configuration(host=host)) as api:
                    return await question(Workloads(api))
            finally:
                await runner.cleanup()

        return asyncio.run(asked())


def two() -> dict[str, Json]:
    return {"c1": workload("w1", 1), "c2": workload("w2", 2)}


async def both(kueue: Workloads) -> list[Any]:
    """What it says about both, one after the other."""
    return [await kueue.queueing("ml", uid) for uid in ("c1", "c2")]


def test_all_runs_of_a_namespace_look_at_one_line() -> None:
    server = Server(two())
    first, second = server.ask(both)
    assert (first.place, second.place) == ((1, 2), (2, 2))
    assert (first.reason, first.message) == (Reason.QUEUED, "1 more needed")
    assert server.lines == 1


def test_a_line_of_a_moment_ago_is_not_for_one_who_has_just_come() -> None:
    server = Server({"c1": workload("w1", 1)})

    async def later(kueue: Workloads) -> Any:
        await kueue.queueing("ml", "c1")
        server.waiting["c2"] = workload("w2", 2)
        return await kueue.queueing("ml", "c2")

    assert server.ask(later).place == (2, 2)
    assert server.lines == 2


def test_a_line_is_kept_for_seconds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "LINE_SECONDS", 0)
    server = Server(two())
    server.ask(both)
    assert server.lines == 2


@pytest.mark.parametrize("limits", [{"selects_fields": False}, {"continued": True}], ids=["older Kueue", "long line"])
def test_without_a_line_there_is_no_place(limits: Json) -> None:
    first, _ = Server(two(), **limits).ask(both)
    assert (first.reason, first.message, first.place) == (Reason.QUEUED, "1 more needed", None)


def test_who_has_its_quota_needs_no_line() -> None:
    reserved = {"type": "QuotaReserved", "status": "True", "reason": "QuotaReserved", "message": ""}
    server = Server({"c1": workload("w1", conditions=[reserved], reserved=True)})
    said = server.ask(lambda kueue: kueue.queueing("ml", "c1"))
    assert said is not None
    assert said.place is None
    assert server.lines == 0


def test_the_older_api_is_asked_where_the_newer_one_is_not_served() -> None:
    said = Server(two(), served=("v1beta1",)).ask(lambda kueue: kueue.queueing("ml", "c1"))
    assert said is not None
    assert said.reason == Reason.QUEUED


def test_no_kueue_is_told() -> None:
    said = Server(two(), served=()).ask(lambda kueue: kueue.queueing("ml", "c1"))
    assert said is not None
    assert said.reason == Reason.KUEUE_MISSING


def test_a_refusal_is_an_error_with_its_words() -> None:
    with pytest.raises(KubeError, match="403: workloads is forbidden"):
        Server(two(), refuses=True).ask(lambda kueue: kueue.queueing("ml", "c1"))
