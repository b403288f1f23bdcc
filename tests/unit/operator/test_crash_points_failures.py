"""What fails in a run, or in the cluster under it: each point of such runs, disturbed in each way (see `simulated`)."""

from collections.abc import Callable

import pytest

from dsft_operator.core import attempt_rules, node_rules
from tests.unit.operator.crash_points import HOW_MANY, POINTS, disturb
from tests.unit.operator.stories import FAILURES, STRANDED_SECONDS, UNREACHABLE_SECONDS


@pytest.mark.timeout(900)
@HOW_MANY
@pytest.mark.parametrize("name", FAILURES)
def test_every_point_heals(
    name: str, every: int, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_rules, "UNREACHABLE_SECONDS", UNREACHABLE_SECONDS)
    monkeypatch.setattr(node_rules, "STRANDED_SECONDS", STRANDED_SECONDS)
    count = disturb(FAILURES[name], every)
    record_property(POINTS, {str(way): number for way, number in count.items()})
