"""A stop waits for no evaluation: the step is committed without it, and the next start makes up for it."""

import signal
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from dsft_api.progress import TrainerPhase
from dsft_trainer.checkpoint.commits import Commit, Patience
from dsft_trainer.checkpoint.listing import read_commits
from tests.trainer.killing import Training, killed_manifest, lines_by_step
from tests.trainer.runs import Manifest, Run, wait_until
from tests.trainer.test_world_size import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 5


def manifest(folder: Path) -> Manifest:
    """The second evaluation is not as much better as is asked for, and ends the training. They take some seconds."""
    document = killed_manifest(folder, steps=STEPS, rows=400)
    document["spec"]["data"]["evalFraction"] = 0.5
    document["spec"]["execution"]["evalBatchSize"] = 1
    document["spec"]["evaluation"] = {"everySteps": 1, "earlyStopping": {"patience": 1, "minDelta": 1000}}
    document["spec"]["checkpoint"] = {"everySteps": STEPS, "keepLast": 10}
    return document


def stop_in_evaluation(run: Run, step: int) -> None:
    """Go on until a step is evaluated, and ask for a stop while it is."""

    def is_evaluated() -> bool:
        told = run.told()
        at = told.progress.step if told is not None and told.progress is not None else 0
        return told is not None and told.phase is TrainerPhase.EVALUATING and at == step

    with run.started() as process:
        wait_until(lambda: process.poll() is not None or is_evaluated(), f"the evaluation of step {step}")
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == ExitCode.INTERRUPTED, run.log_tail()


def newest(run: Run) -> Commit:
    return read_commits(run.store)[-1]


def test_what_a_stop_left_out_is_made_up_for(tmp_path: Path) -> None:
    document = manifest(tmp_path)
    reference, run = Run(document, tmp_path / "reference"), Run(document, tmp_path / "run")
    # The stop is asked for before the first step has ended ...
    train(tmp_path, str(reference.folder), ".2", str(run.folder), "2")
    assert (newest(run).name, newest(run).metrics, newest(run).patience) == ("step-00000001-a1.g1", {}, None)
    # ... and in the evaluation of the second one.
    stop_in_evaluation(run, 2)
    assert (newest(run).name, newest(run).metrics) == ("step-00000002-a2.g1", {})
    run.finish()

    training = Training(lines_by_step(reference, "train"), lines_by_step(reference, "eval"))
    seen = [
        [(line["kind"], line["step"]) for line in run.metrics(claim.id) if not training.assert_equal(run, claim)]
        for claim in run.claims()
    ]
    assert seen == [[("train", 1)], [("eval", 1), ("train", 2)], [("eval", 2)]]
    assert (training.trained.keys(), training.evaluated.keys()) == ({1, 2}, {1, 2})
    # The best is the first one, and the export is of it.
    best, last = (commit for commit in read_commits(run.store) if commit.metrics)
    expected = read_commits(reference.store)
    assert [(c.step, c.metrics, c.patience) for c in (best, last)] == [
        (c.step, c.metrics, c.patience) for c in expected
    ]
    assert last.patience == Patience(best=best.metrics["loss"], without=1)
    assert run.weights() == reference.weights() != {}
