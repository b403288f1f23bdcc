"""A run that is looked at before it has a RayCluster: each point, disturbed in each way (see `simulated`)."""

from collections.abc import Callable

import pytest

from dsft_operator.core import preflight_rules
from tests.unit.operator.crash_points import HOW_MANY, POINTS, disturb
from tests.unit.operator.stories import PREFLIGHT_SECONDS, PREFLIGHTS


@pytest.mark.timeout(900)
@HOW_MANY
@pytest.mark.parametrize("name", PREFLIGHTS)
def test_every_point_heals(
    name: str, every: int, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_rules, "SECONDS", PREFLIGHT_SECONDS)
    count = disturb(PREFLIGHTS[name], every)
    record_property(POINTS, {str(way): number for way, number in count.items()})
