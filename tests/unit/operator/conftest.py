"""The count of crash points at the end of a session, whichever worker disturbed them."""

from collections import Counter

import pytest

POINTS = "crash points"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many points there were, in which ways."""
    count: Counter[str] = Counter()
    runs = 0
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == POINTS and report.when == "call":
                count.update(value)
                runs += 1
    if runs:
        ways = ", ".join(f"{way} {number}" for way, number in count.items())
        terminalreporter.write_line(f"{POINTS}: {count.total()} in {runs} whole runs of the operator ({ways})")
