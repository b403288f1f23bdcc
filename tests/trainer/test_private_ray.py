"""The Ray that a run on one machine starts for itself."""

import pytest
import ray

from dsft_api.job import Job, Ranks, RunRef
from dsft_api.spec import FineTuneSpec
from dsft_trainer.runtime import ray as runtime

JOB = Job(
    run=RunRef(namespace="default", name="tiny", uid="0a1b2c3d"),
    attempt=1,
    spec=FineTuneSpec.model_validate({"program": {"entrypoint": "json:loads"}}),
    spec_hash="sha256:0",
    storage_prefix="file:///nowhere",
    ranks=Ranks(count=2, device="cpu", threads=1),
)
TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.mark.parametrize(("failures", "starts"), [(1, 2), (5, runtime.PRIVATE_STARTS)])
def test_a_start_that_timed_out_is_tried_again(monkeypatch, failures: int, starts: int) -> None:
    """Only Ray's time limit is played here: nothing makes it come true without stopping the machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-this-test")
    begun: list[object] = []

    def init(**_: object) -> None:
        begun.append(None)
        if len(begun) <= failures:
            raise Exception(TIMED_OUT)  # noqa: TRY002  as Ray does

    monkeypatch.setattr(ray, "init", init)
    if failures < starts:
        runtime._connect(JOB)
    else:
        with pytest.raises(Exception, match="timed out during startup"):
            runtime._connect(JOB)
    assert len(begun) == starts
