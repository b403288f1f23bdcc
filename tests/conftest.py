"""Session fixtures: real parts that start in seconds and end with the tests."""

from collections.abc import Iterator

import pytest
from tests.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3") / "server")
    yield server
    server.stop()
