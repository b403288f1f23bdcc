"""Fixtures of the trainer's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from dsft_trainer.checkpoint.store import Store, open_store


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A process group of this process alone: what is collective has one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """The folder of a run, empty, on either kind of storage."""
    return open_store(request.getfixturevalue("s3_uri") if request.param == "s3" else (tmp_path / "run").as_uri())
