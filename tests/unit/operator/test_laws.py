"""The laws of the design, under storms: faults, edits, lost answers, old reads and dying operators in any order.

1. At most one live RayCluster per run, one driver, one submission per attempt; what a superseded attempt writes is never read.
2. What the status lists as committed was committed, and is not unlisted.
3. The run goes on by itself and ends with the same status.
4. Only status and finalizer are written; a RayCluster is made and deleted, never changed.
"""

import asyncio
import inspect
from typing import Any, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dsft_api.conditions import Phase
from dsft_operator.core import decision
from dsft_operator.ports import Kube, KubeError
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.settling import MOST_PASSES_AT_ONCE, outcome, settle
from tests.unit.operator.world import KEY, STEPS, Crash, World

FAULTS = ["restart_head", "lose_worker", "lose_cluster", "take_nodes", "let_a_zombie_write"]


def spec(queued: bool, looks: bool) -> dict[str, Any]:
    """A run in a queue or not, with a preflight or not."""
    return {
        "retry": {"limit": 100},
        "preflight": {"enabled": looks},
        **({"queue": {"name": "team-a"}} if queued else {}),
    }


def undisturbed(queued: bool, looks: bool) -> Any:
    """How a run ends that nothing happens to."""
    world = World(spec(queued, looks), generous=True)
    settle(world)
    return outcome(world)


class Storm(RuleBasedStateMachine):
    """One run, from apply to its end or its deletion."""

    @initialize(queued=st.booleans(), looks=st.booleans())
    def apply(self, *, queued: bool, looks: bool) -> None:
        self.queued, self.looks = queued, looks
        self.world = World(spec(queued, looks), generous=True)
        self.operator = operator_in(self.world)
        self.listed = 0

    def look(self) -> None:
        """One pass of an operator that may die in it."""
        try:
            asyncio.run(self.operator.reconcile(KEY))
        except KubeError:
            pass
        except Crash:
            self.operator = operator_in(self.world)

    def live_on(self, beats: list[int]) -> None:
        """So many passes, then a tick, and again: what happens most of the time, so that a run gets somewhere."""
        for passes in beats:
            for _ in range(passes):
                self.look()
            self.world.tick()

    beats = rule(beats=st.lists(st.integers(0, 3), min_size=1, max_size=6))
    morning, noon, evening = beats(live_on), beats(live_on), beats(live_on)

    @rule(fault=st.sampled_from(FAULTS))
    def lose(self, fault: str) -> None:
        getattr(self.world, fault)()

    @rule(what=st.sampled_from(["kuberay", "api_down", "ray_down", "hold", "mute"]), ticks=st.integers(1, 50))
    def take_away_for_a_while(self, what: str, ticks: int) -> None:
        self.world.go_without(what, ticks)

    @rule(later=st.integers(1, 4), how=st.sampled_from(["before", "after", "answer", "old reads"]))
    def go_wrong_soon(self, later: int, how: str) -> None:
        call = self.world.calls + later
        match how:
            case "before" | "after":
                self.world.crash_at = (call, how == "after")
            case "answer":
                self.world.lost_reply_at = call
            case _:
                self.world.stale_reads = later

    @rule(what=st.sampled_from(["suspend", "resume", "pools", "token", "delete"]), sure=st.integers(0, 4))
    def edit(self, what: str, sure: int) -> None:
        world = self.world
        pool = {"name": "gpu", "nodes": 2, "gpusPerNode": 1, "nodeSelector": {"zone": str(sure)}}
        match what:
            case "suspend" | "resume":
                world.edit(suspend=what == "suspend")
            case "token":
                world.edit(retry={"limit": 100, "token": str(sure)})
            case "pools" if world.seen_status.phase in (
                None,
                Phase.PENDING,
                Phase.QUEUED,
                Phase.SUSPENDED,
                Phase.FAILED,
            ):
                world.edit(nodePools=[pool])
            case "delete" if sure == 0:
                world.delete()
            case _:
                pass

    @rule()
    def stand_still(self) -> None:
        """While nothing changes, the operator comes to rest: no status that is written for ever."""
        if self.world.api_down:
            return
        for _ in range(MOST_PASSES_AT_ONCE):
            before = self.world.calls
            self.look()
            if self.world.calls == before:
                return
        raise AssertionError(f"turns in circles: {self.world.seen_status.message}")

    @invariant()
    def status_says_why(self) -> None:
        status = self.world.seen_status
        assert status.phase is None or status.message
        assert all(condition.reason for condition in status.conditions)
        assert len([attempt for attempt in status.attempts if attempt.end_time is None]) <= 1
        assert [attempt.number for attempt in status.attempts] == sorted({a.number for a in status.attempts})

    @invariant()
    def commits_are_listed_truly(self) -> None:
        checkpoints = self.world.seen_status.checkpoints
        step = checkpoints.latest.step if checkpoints and checkpoints.latest else 0
        assert self.listed <= step <= self.world.committed
        self.listed = step

    @invariant()
    def one_of_each(self) -> None:
        self.world.check_laws()

    @invariant()
    def nothing_is_changed_that_is_not_ours(self) -> None:
        self.world.check_untouched()

    def teardown(self) -> None:
        world = self.world
        world.restore()
        world.edit(suspend=False)
        settle(world, 400)
        if world.deleting is not None:
            assert world.gone
            return
        assert world.seen_status.phase is Phase.SUCCEEDED, world.seen_status.message
        assert world.committed == STEPS
        assert world.clusters == {}
        assert world.jobs == {}
        assert outcome(world) == undisturbed(self.queued, self.looks)


TestStorm = Storm.TestCase
TestStorm.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_no_action_and_no_port_changes_what_is_not_ours() -> None:
    """Law 4 by construction: there is no word for changing a spec, a label, an annotation, or a RayCluster that exists."""
    actions = {action.__name__ for action in get_args(decision.Action)}
    assert actions == {
        "AddFinalizer",
        "RemoveFinalizer",
        "CreateCluster",
        "CreateJob",
        "DeleteJob",
        "CreateChild",
        "CreateToken",
        "DeleteCluster",
        "SubmitJob",
        "RequestSave",
        "StopJob",
    }
    verbs = {name for name, _ in inspect.getmembers(Kube, inspect.isfunction) if not name.startswith("_")}
    reads = {"run", "runs", "cluster", "preflight", "pods", "queueing", "warnings", "node_trouble", "token"}
    assert verbs - reads == {
        "create",
        "create_token",
        "delete_cluster",
        "delete_job",
        "set_finalizer",
        "apply_status",
        "event",
    }
