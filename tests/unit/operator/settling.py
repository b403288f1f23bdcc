"""A run in a World brought to its rest, and what must then be the same however it came there."""

import asyncio
import re
from typing import Any

from dsft_api.status import FineTuneStatus
from dsft_operator.ports import KubeError
from tests.unit.operator.fake_ports import operator_in
from tests.unit.operator.situations import NOW
from tests.unit.operator.world import KEY, Crash, World

PASSES = 200
# Passes at one moment until nothing is left to do: the longest chain of steps of the rules, and some.
MOST_PASSES_AT_ONCE = 12


def settle(world: World, passes: int = PASSES) -> None:
    """Reconcile and let time go by until the run has ended and nothing is left to do."""
    operator = operator_in(world)
    quiet = at_once = 0
    for _ in range(passes):
        try:
            pause = asyncio.run(operator.reconcile(KEY))
        except KubeError:
            pause = 1.0
        except Crash:
            world.crash_at = None
            operator, pause = operator_in(world), 0.0
        quiet = quiet + 1 if pause is None else 0
        if quiet > 1:
            return
        at_once = at_once + 1 if pause == 0.0 else 0
        assert at_once < MOST_PASSES_AT_ONCE, f"turns in circles: {world.seen_status.message}"
        if pause != 0.0:
            world.tick()
    raise AssertionError(f"not settled after {passes} passes: {world.seen_status.phase} {world.seen_status.message}")


# How long it was, and the words of the last look: another look has others.
_SILENCE = re.compile(r"for \d+ s: .* ->")


def without_times(status: FineTuneStatus) -> FineTuneStatus:
    """A status without what the clock and the number of attempts decide."""
    conditions = tuple(condition.model_copy(update={"last_transition_time": NOW}) for condition in status.conditions)
    return replace_status(status, conditions=conditions)


def replace_status(status: FineTuneStatus, **changes: Any) -> FineTuneStatus:
    timeless: dict[str, Any] = dict.fromkeys(("start_time", "completion_time", "phase_time"), NOW)
    if (look := status.preflight) is not None:
        timeless["preflight"] = look.model_copy(
            update={"start_time": NOW, "end_time": NOW if look.end_time is not None else None}
        )
    attempts = tuple(
        a.model_copy(
            update={
                "start_time": NOW,
                "end_time": NOW,
                "spent": None,
                "message": _SILENCE.sub("for N s ->", a.message or ""),
            }
        )
        for a in status.attempts
    )
    return status.model_copy(update={**timeless, "attempts": attempts, "usage": None, **changes})


def outcome(world: World) -> Any:
    """What must be the same however a run came to its end: all but times, and the book of how it came there."""
    status = without_times(world.seen_status)
    ways = (
        "attempt",
        "attempts",
        "retries",
        "ray_cluster",
        "job",
        "observed_generation",
        "retry_token",
        "resolved",
        "logs",
        "preflight",
    )
    conditions = tuple(condition.model_copy(update={"observed_generation": 1}) for condition in status.conditions)
    checkpoints = status.checkpoints and status.checkpoints.model_copy(update={"retained": ()})
    return status.model_copy(update={**dict.fromkeys(ways), "conditions": conditions, "checkpoints": checkpoints})
