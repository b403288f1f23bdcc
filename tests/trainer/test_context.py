"""What dsft tells a program beyond Ray Train: drain, deadline, folder. In a process of its own, nothing."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from dsft_api.job import Job, Ranks, RunRef
from dsft_api.manifest import parse
from dsft_trainer import context

NOW = datetime.now(UTC).replace(microsecond=0)
MANIFEST = """
apiVersion: dsft.dev/v1alpha1
kind: DeepSpeedFineTune
metadata: {name: mine}
spec:
  program: {entrypoint: "mine:train"}
  checkpoint: {drainSeconds: 60}
"""


def job(end_by: datetime | None = None) -> Job:
    return Job(
        run=RunRef(namespace="ml", name="mine", uid="u"),
        attempt=1,
        spec=parse(MANIFEST).spec,
        spec_hash="sha256:0",
        storage_prefix="s3://bucket/ml/mine-u",
        ranks=Ranks(count=1, device="cpu", threads=1),
        end_by=end_by,
    )


def never() -> None:
    return None


def after(looks: int) -> Callable[[], datetime | None]:
    """Who is asked to stop at the look after so many."""
    left = [None] * looks + [NOW]
    return lambda: left.pop(0)


def test_where_dsft_did_not_start_the_process_nothing_is_asked() -> None:
    assert (context.drain_requested(), context.deadline(), context.run_folder()) == (False, None, None)


def test_the_folder_is_told_while_the_program_runs() -> None:
    with context.running(job(), never):
        assert context.run_folder() == "s3://bucket/ml/mine-u"
    assert context.run_folder() is None


@pytest.mark.parametrize(
    ("end_by", "before", "drained"),
    [
        (None, None, NOW + timedelta(seconds=60)),
        (NOW + timedelta(hours=1), NOW + timedelta(hours=1), NOW + timedelta(seconds=60)),
        (NOW + timedelta(seconds=5), NOW + timedelta(seconds=5), NOW + timedelta(seconds=5)),
    ],
    ids=["no bound", "a late bound", "a near bound"],
)
def test_the_deadline_is_the_nearest(end_by: datetime | None, before: datetime | None, drained: datetime) -> None:
    with context.running(job(end_by), lambda: NOW):
        assert context.deadline() == before
        assert context.drain_requested()
        assert context.deadline() == drained


def test_a_request_is_told_for_good_and_the_launcher_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "LOOK_SECONDS", 0.0)
    with context.running(job(), after(looks=2)) as was_drained:
        assert [context.drain_requested() for _ in range(4)] == [False, False, True, True]
        assert was_drained()


def test_the_launcher_is_not_asked_at_every_step() -> None:
    with context.running(job(), after(looks=1)) as was_drained:
        assert not any(context.drain_requested() for _ in range(1000))
        assert not was_drained()


def test_ranks_agree(process_group: None) -> None:
    with context.running(job(), lambda: NOW):
        assert context.drain_requested()
        assert context.deadline() == NOW + timedelta(seconds=60)
