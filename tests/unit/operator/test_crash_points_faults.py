"""Something happens to a run between any two calls of the operator: a cluster, head or worker goes, or a user acts."""

from collections.abc import Callable

import pytest

from tests.unit.operator.crash_points import HOW_MANY, POINTS, interrupt
from tests.unit.operator.stories import FAULTS, RESUMED


@pytest.mark.timeout(900)
@HOW_MANY
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_point_heals(fault: str, every: int, record_property: Callable[[str, object], None]) -> None:
    count = interrupt(RESUMED, FAULTS[fault], every)
    record_property(POINTS, {str(way): number for way, number in count.items()})
