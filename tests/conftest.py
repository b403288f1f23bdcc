"""Session fixtures: real parts that start in seconds and end with the tests. And what a session tells at its end."""

from collections import Counter
from collections.abc import Iterator
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings

from tests.s3_server import S3Server
from tests.unit.operator.crash_points import POINTS

# No test is timed by the way: others may use the cores.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3") / "server")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket("dsft-tests")


@pytest.fixture
def s3_uri(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of its own on the S3 server, which the environment names."""
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    return f"{s3_bucket}/{uuid4().hex}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many crash points of the operator there were, in which ways, whichever worker disturbed them.

    Here, since the process that prints does not load the conftest.py of folders below where workers run the tests.
    """
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
