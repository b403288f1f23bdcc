"""What becomes of annotation dsft.dev/checkpoint-request while a driver runs."""

from dataclasses import replace
from typing import Any

import pytest

from dsft_api.job import SAVE_ENV
from dsft_api.progress import TrainerPhase
from dsft_operator.core.decision import RequestSave
from dsft_operator.core.observed import Observed, RayJob, Unknown
from dsft_operator.core.saving import ENTRYPOINT, MARK
from tests.unit.operator.situations import UID, after, submitted, told

PROGRAM: dict[str, Any] = {
    **dict.fromkeys(("model", "data", "training")),
    "program": {"entrypoint": "mine:train"},
    "checkpoint": {},
}


def training(value: str | None = "now", spec: dict[str, Any] | None = None, **facts: Any) -> Observed:
    """A run that trains, with a request."""
    seen = replace(submitted(spec), progress=told(TrainerPhase.TRAINING, step=5))
    return replace(seen, run=replace(seen.run, checkpoint_request=value), **facts)


def test_it_is_passed_on_once_and_then_waited_for() -> None:
    seen, decision = after(training())
    (action,) = decision.actions
    assert isinstance(action, RequestSave)
    assert action.submission.entrypoint == ENTRYPOINT
    assert action.submission.environment == {SAVE_ENV: "now"}
    assert action.submission.submission_id.startswith(f"{UID[:8]}-a1-save-")
    assert seen.run.status.message == f"step 5 of 100{MARK}"
    for state in ("PENDING", "RUNNING", "SUCCEEDED"):
        seen, decision = after(replace(seen, save=RayJob(action.submission.submission_id, state)))
        assert decision.actions == ()
        assert seen.run.status.message == f"step 5 of 100{MARK}"


def test_the_answer_is_echoed_and_nothing_is_asked_again() -> None:
    answered = told(TrainerPhase.TRAINING, step=7, committed=6, checkpoint_request="now")
    seen, decision = after(replace(training(), progress=answered))
    assert decision.actions == ()
    assert seen.run.status.checkpoint_request == "now"
    assert seen.run.status.message == "step 7 of 100"
    seen, decision = after(replace(seen, progress=told(TrainerPhase.TRAINING, step=8)))
    assert decision.actions == (), "also where a later start of the ranks does not tell it any more"
    assert seen.run.status.checkpoint_request == "now"


def test_another_value_is_another_request() -> None:
    seen, first = after(training("one"))
    _, second = after(replace(seen, run=replace(seen.run, checkpoint_request="two")))
    ids = {
        action.submission.submission_id
        for d in (first, second)
        for action in d.actions
        if isinstance(action, RequestSave)
    }
    assert len(ids) == 2


def test_a_status_that_cannot_be_read_does_not_say_it_twice() -> None:
    seen, _ = after(training())
    seen, decision = after(replace(seen, progress=Unknown("slow"), save=RayJob("save", "RUNNING")))
    assert decision.actions == ()
    assert seen.run.status.message is not None
    assert seen.run.status.message.count(MARK) == 1


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (training(progress=told(TrainerPhase.LOADING)), "it is made once the ranks train"),
        (training(progress=None), "it is made once the ranks train"),
        (training("x" * 257), "at most 256 printable characters"),
        (training("a\nb"), "at most 256 printable characters"),
        (training(spec=PROGRAM), "a program decides itself"),
        (training(save=Unknown("slow")), MARK),
        (training(save=RayJob("save", "FAILED", message="trace\nno run here takes a request")), "no run here takes"),
    ],
    ids=["loading", "unread", "too long", "two lines", "program", "not known", "failed"],
)
def test_what_is_not_passed_on_is_explained(seen: Observed, words: str) -> None:
    after_it, decision = after(seen)
    assert decision.actions == ()
    assert after_it.run.status.message is not None
    assert words in after_it.run.status.message


@pytest.mark.parametrize("value", [None, ""])
def test_nobody_asks(value: str | None) -> None:
    seen, decision = after(training(value))
    assert decision.actions == ()
    assert seen.run.status.message == "step 5 of 100"


def test_a_value_that_comes_back_is_a_request_again() -> None:
    ids = []
    for answered in (None, "other"):
        seen = training("now")
        status = seen.run.status.model_copy(update={"checkpoint_request": answered})
        _, decision = after(replace(seen, run=replace(seen.run, status=status)))
        ids += [action.submission.submission_id for action in decision.actions if isinstance(action, RequestSave)]
    assert len(set(ids)) == 2
