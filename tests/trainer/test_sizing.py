"""What the plan says of the data is what a run makes of it."""

from pathlib import Path
from typing import Any

import pytest

from dsft_trainer.sizing import data_size
from tests.trainer import tiny
from tests.trainer.data.test_mixture import job_on, member, prepared

MADE: dict[str, dict[str, Any]] = {"mixed": {}, "packed": {"packing": True}, "held out": {"evalFraction": 0.1}}


@pytest.mark.parametrize("data", MADE)
def test_samples_and_tokens_of_an_epoch_are_those_of_the_run(tmp_path: Path, data: str) -> None:
    members = member(tmp_path, "text", 40, 3.0), member(tmp_path, "prompt_completion", 24)
    job = job_on(*members, **MADE[data])
    model = tiny.llama(tmp_path / "model")
    size = data_size(job, model, tmp_path / "cache", most_rows=1000)
    run = prepared(job, tmp_path / "tokens")
    assert (size.rows, size.eval_rows, size.longest) == (
        len(run.train),
        len(run.eval) if run.eval else 0,
        int(run.train.lengths.max()),
    )
    assert size.positions == run.train.positions
    drawn = run.batches(job.spec.workload())
    epochs = 10
    tokens = sum(int(run.train.lengths[drawn.batch(step)].sum()) for step in range(epochs * drawn.steps_per_epoch))
    counted = size.tokens / size.rows * epochs * drawn.steps_per_epoch * drawn.global_batch_size
    assert counted == pytest.approx(tokens, rel=0.05)
