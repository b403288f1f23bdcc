"""A run on Ray that is killed without warning trains exactly as one that never was."""

from pathlib import Path

import pytest

from tests.trainer.killing import in_storage, kill_and_compare, killed_manifest, killer_of, never_killed
from tests.trainer.runs import Manifest, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return killed_manifest(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def reference(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return never_killed(manifest, tmp_path_factory.mktemp("reference") / "run")


def test_killed_twice_with_files(manifest: Manifest, reference: Run, tmp_path: Path) -> None:
    killer = killer_of(manifest, tmp_path / "run", "ray", "file")
    kill_and_compare(killer, reference, finisher="ray", kills=2)


def test_killed_with_s3_and_finished_by_torchrun(
    manifest: Manifest, reference: Run, tmp_path: Path, s3_uri: str
) -> None:
    """Who starts the ranks may change between attempts."""
    killer = killer_of(in_storage(manifest, s3_uri), tmp_path / "run", "ray", "s3")
    kill_and_compare(killer, reference, finisher="torchrun", kills=1)
