"""Disturb a story at each of its points, and say what came out another way than it should."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dsft_api.conditions import ConditionType, FailureClass
from dsft_api.status import FineTuneStatus, Usage
from tests.unit.operator.settling import outcome, without_times
from tests.unit.operator.simulated import AT_EACH_CALL, SILENCE, Point, Simulation, Way, points
from tests.unit.operator.situations import NOW
from tests.unit.operator.stories import Story
from tests.unit.operator.world import World

# `make test` takes some of the points, evenly; `make test-drills` all. Seven, since at each call there are four ways.
HOW_MANY = pytest.mark.parametrize(
    "every", [pytest.param(7, id="each seventh"), pytest.param(1, id="each", marks=pytest.mark.drill)]
)
POINTS = "crash points"
"""The property of a test's report that has the count."""
SLACK_SECONDS = 10


def recorded(story: Story) -> Simulation:
    """The undisturbed run, which is what it is told to be."""
    run = story.simulation().run()
    world = run.world
    assert (None if world.gone else world.seen_status.phase) is story.end
    assert world.gone == (story.end is None)
    assert (len(world.submissions), world.made) == (story.submissions, story.clusters)
    assert not list(remains(run))
    return run


def disturb(story: Story, every: int) -> Counter[Way]:
    """Disturb a story everywhere, or at one point of so many; how many points that were, by the way of disturbance.

    Raises:
        AssertionError: with every point at which something came out another way.
    """
    run = recorded(story)
    enumerated = points(run)
    count = Counter(point.way for point in enumerated)
    assert all(count[way] == len(run.calls) for way in AT_EACH_CALL)
    assert count[Way.DROPPED] == len(run.events)
    assert count[Way.LATE] >= len([version for version in run.versions if version])
    tried = some(enumerated, every)
    wrong = [f"{told(run, point)}: {problem}" for point in tried for problem in problems(story, run, point)]
    assert not wrong, f"{len(wrong)} of {len(tried)} points:\n" + "\n".join(wrong)
    return Counter(point.way for point in tried)


def some(all_: list[Point], every: int) -> list[Point]:
    """One of so many points; of stories of other lengths, others."""
    return all_[len(all_) % every :: every]


def problems(story: Story, undisturbed: Simulation, point: Point) -> Iterator[str]:
    """What a run that is disturbed at a point has other than the undisturbed one."""
    try:
        run = story.simulation(point).run()
    except AssertionError as error:
        yield str(error).partition("\n")[0]
        return
    if point.way is Way.DROPPED:
        assert run.events[: point.at] == undisturbed.events[: point.at], "not the same run up to the point"
    else:
        assert run.calls[: point.at] == undisturbed.calls[: point.at], "not the same run up to the point"
    assert run.restarts == (point.way in (Way.DIES_BEFORE, Way.DIES_AFTER))
    yield from remains(run)
    yield from miscounted(story, run)
    one, other = run.world, undisturbed.world
    if one.gone or other.gone:
        if one.gone != other.gone:
            yield f"ended {one.seen_status.phase}, gone: {one.gone}"
        return
    if point.way is Way.LATE:
        # An attempt or a cluster more is no harm where what was read is not so; the end is the same.
        left, right = plain(settled(one)), plain(settled(other))
        # Who did not see a pod does not know on which node it was: then no node is blamed.
        left["avoided_nodes"] = right["avoided_nodes"] = None
        if story.is_cut_off:
            # Where time was up, an attempt more has come another way.
            left["progress"] = right["progress"] = None
        yield from differences("outcome", left, right)
        return
    if one.submissions != other.submissions:
        yield f"submitted {one.submissions}"
    if one.made > other.made:
        yield f"made {one.made} clusters"
    yield from differences("status", plain(without_times(one.seen_status)), plain(without_times(other.seen_status)))


def miscounted(story: Story, run: Simulation) -> Iterator[str]:
    """Seconds that status.usage counts twice, or leaves out of a run in which no user let time pass."""
    status = run.world.seen_status
    if not status.attempts or status.attempts[-1].end_time is None or run.world.gone:
        return
    seconds, all_ = counted(status), whole(status)
    # A read that is late may say of what has ended that it has not; one that dies before its first write comes back after 7 s.
    slack = SLACK_SECONDS + len(status.attempts)
    if seconds > all_ + slack or (not story.pauses and seconds < all_ - slack):
        yield f"usage counts {seconds:.0f} of {all_:.0f} s"


def counted(status: FineTuneStatus) -> float:
    """All seconds of status.usage."""
    usage = status.usage or Usage()
    parts = (usage.useful_seconds, usage.redone_seconds, usage.waiting_seconds, usage.blocked_seconds)
    return sum(part or 0.0 for part in (*parts, usage.restart_seconds))


def whole(status: FineTuneStatus) -> float:
    """Seconds from the first moment to the end of the last attempt. That the operator saw this end later does not count."""
    end = status.attempts[-1].end_time
    assert end is not None
    return (end - NOW).total_seconds()


def interrupt(story: Story, meanwhile: Callable[[World], None], every: int) -> Counter[Way]:
    """Have something happen right before each call of a story, or one of so many; how many points that were.

    Raises:
        AssertionError: with every point after which the end was another one, or a law broken.
    """
    run = recorded(story)
    wrong: list[str] = []
    tried = some([Point(Way.MEANWHILE, at) for at in range(1, len(run.calls) + 1)], every)
    for point in tried:
        try:
            other = story.simulation(point, meanwhile).run()
        except AssertionError as error:
            wrong.append(f"{told(run, point)}: {error}")
            continue
        is_deleted = other.world.deleting is not None
        found = [*remains(other), *([] if is_deleted == other.world.gone else ["it is not gone"])]
        if not is_deleted:
            found += differences("outcome", plain(settled(other.world)), plain(settled(run.world)))
        wrong += [f"{told(run, point)}: {problem}" for problem in found]
    assert not wrong, f"{len(wrong)} of {len(tried)} points:\n" + "\n".join(wrong)
    return Counter({Way.MEANWHILE: len(tried)})


def settled(world: World) -> FineTuneStatus:
    """The outcome, without what the last cluster and the last submission were like."""
    status = outcome(world)
    passing = (ConditionType.CLUSTER_READY, ConditionType.JOB_SUBMITTED)
    return status.model_copy(update={"conditions": tuple(c for c in status.conditions if c.type not in passing)})


def plain(status: FineTuneStatus) -> Any:
    """A status without the ids of what was made, and without words that are those of the last look.

    A RayCluster that nobody knew when it was deleted has no number. An operator that died right after it had deleted a
    RayCluster whose head was silent finds it deleted, and says so. A deadline tells what was waited for, or that it was not told.
    """
    text = status.model_dump_json(exclude={"ray_cluster"}).replace(SILENCE, "Kueue has not looked at it yet")
    document = json.loads(text)
    for attempt in document["attempts"] or ():
        del attempt["incarnation"]
        if attempt["failure_class"] == FailureClass.HEAD_LOST:
            del attempt["message"]
    return document


def differences(where: str, one: Any, other: Any) -> Iterator[str]:
    """Where two documents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from differences(f"{where}.{name}", one.get(name), other.get(name))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(f"{where}[{number}]", left, right)
    elif one != other:
        yield f"{where} is {one!r}, not {other!r}"


def remains(run: Simulation) -> Iterator[str]:
    """What nobody needs any more, and is there."""
    if left := [*run.world.clusters, *run.world.children, *run.world.jobs]:
        yield f"left: {left}"


def told(run: Simulation, point: Point) -> str:
    """A point in words."""
    where = run.events[point.at - 1] if point.way is Way.DROPPED else run.calls[point.at - 1]
    return f"{point.at} ({where}) {point.way}" + (f" by {point.late}" if point.late else "")
