"""Session fixtures: real parts that start in seconds and end with the tests."""

from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.s3_server import S3Server


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
