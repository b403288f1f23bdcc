"""One file, two places: `dsft run -f` on this machine and `kubectl apply -f` on the cluster train the same model."""

import pytest

from dsft_api.conditions import Phase
from dsft_api.status import CheckpointRef, FineTuneStatus
from tests.cli.command import Dsft
from tests.e2e.manifests import QUICKSTART
from tests.e2e.quickstart import Finished

pytestmark = pytest.mark.long

# From the same seed, but sums are made in another order where there are more threads.
TOLERANCE = 0.01
SECONDS = 900


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> FineTuneStatus:
    """The status of the quickstart's own file, run here."""
    dsft = Dsft(tmp_path_factory.mktemp("local"))
    with dsft.start("run", "-f", str(QUICKSTART)) as running:
        out, err = running.process.communicate(timeout=SECONDS)
        assert running.process.returncode == 0, out + err
    (run,) = dsft.run_folders()
    return run.status


def test_both_end_well_with_the_same_model(local: FineTuneStatus, quickstart: Finished) -> None:
    there = quickstart.status
    assert local.phase is there.phase is Phase.SUCCEEDED
    assert local.progress is not None
    assert there.progress is not None
    assert (local.progress.step, local.progress.epoch) == (there.progress.step, there.progress.epoch)
    assert local.evaluation is not None
    assert there.evaluation is not None
    assert local.evaluation.metrics == pytest.approx(there.evaluation.metrics, abs=TOLERANCE)
    assert [c.step for c in _retained(local)] == [c.step for c in _retained(there)]
    assert local.output is not None
    assert there.output is not None
    assert (local.output.format, local.output.bytes) == (there.output.format, there.output.bytes)


def test_both_statuses_say_it_in_the_same_words(local: FineTuneStatus, quickstart: Finished) -> None:
    """Whoever reads one status can read the other: what the cluster adds are cluster, job, pods' images and nodes."""
    here = {c.type: (c.status, c.reason) for c in local.conditions}
    there = {c.type: (c.status, c.reason) for c in quickstart.status.conditions}
    assert here.items() <= there.items()
    assert local.model_fields_set <= quickstart.status.model_fields_set


def _retained(status: FineTuneStatus) -> tuple[CheckpointRef, ...]:
    return status.checkpoints.retained if status.checkpoints else ()
