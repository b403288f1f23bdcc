"""A run under torchrun that is killed without warning, 20 times, trains exactly as one that never was."""

from pathlib import Path

import pytest

from tests.s3_faults import faulty
from tests.s3_server import S3Server
from tests.trainer.killing import (
    assert_same_training,
    in_storage,
    kill_and_compare,
    killed_manifest,
    killer_of,
    never_killed,
)
from tests.trainer.runs import Manifest, Run, kill_session, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return killed_manifest(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def reference(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return never_killed(manifest, tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.drill
def test_killed_ten_times_with_files(manifest: Manifest, reference: Run, tmp_path: Path) -> None:
    killer = killer_of(manifest, tmp_path / "run", "torchrun", "file")
    kill_and_compare(killer, reference, finisher="torchrun", kills=10)


@pytest.mark.drill
def test_killed_ten_times_with_s3(manifest: Manifest, reference: Run, tmp_path: Path, s3_uri: str) -> None:
    killer = killer_of(in_storage(manifest, s3_uri), tmp_path / "run", "torchrun", "s3")
    kill_and_compare(killer, reference, finisher="torchrun", kills=10)


def told_step(run: Run) -> int:
    """The step that the trainer told last."""
    told = run.told()
    return told.progress.step if told is not None and told.progress is not None else 0


def test_killed_while_training_goes_on_beside_an_upload(
    manifest: Manifest,
    reference: Run,
    tmp_path: Path,
    s3_server: S3Server,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shards of step 6 are held up, so two steps are done that no commit knows."""
    with faulty(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        gate = proxy.hold(lambda method, path: method == "PUT" and "step-00000006-" in path)
        run = Run(in_storage(manifest, s3_uri), tmp_path / "run")
        with run.started() as process:
            wait_until(lambda: process.poll() is not None or told_step(run) >= 8, "step 8, beside the upload of step 6")
            assert process.poll() is None, run.log_tail()
            assert gate.held, "no upload was on its way"
            # The first evaluation, after step 4, is the best so far.
            assert run.newest_step() == 4
            kill_session(process)
        gate.open()
        run.finish()
        assert [claim.base_step for claim in run.claims()] == [0, 4]
        run.assert_commits_whole()
        assert_same_training(run, reference)
