"""A run that waits, for a queue, KubeRay, a Secret, a name, or in vain: each point, disturbed in each way (see `simulated`)."""

from collections.abc import Callable

import pytest

from tests.unit.operator.crash_points import HOW_MANY, POINTS, disturb
from tests.unit.operator.stories import WAITS


@pytest.mark.timeout(900)
@HOW_MANY
@pytest.mark.parametrize("name", WAITS)
def test_every_point_heals(name: str, every: int, record_property: Callable[[str, object], None]) -> None:
    count = disturb(WAITS[name], every)
    record_property(POINTS, {str(way): number for way, number in count.items()})
