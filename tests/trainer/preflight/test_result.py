"""What the preflight tells, and what it keeps to itself: in a document that fits its place."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.preflight import MESSAGE_BYTES, Finding, PreflightResult
from dsft_api.status import Inputs
from dsft_trainer import preflight_checks, preflight_job
from dsft_trainer.errors import TrainerError
from dsft_trainer.preflight_job import Check, preflight
from tests.trainer.preflight.looks import Found, the


def test_no_secret_gets_into_the_result(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(_: preflight_checks.Look) -> None:
        raise TrainerError(FailureClass.STORAGE_DENIED, "no way by http://user:pw@proxy with wandb-secret-1")

    def lose(_: preflight_checks.Look) -> None:
        raise TrainerError(FailureClass.UNKNOWN, "no answer with wandb-secret-1")

    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-1")
    monkeypatch.setattr(preflight_job, "CHECKS", (Check(leak, "spec.storage"), Check(lose, "spec.model")))
    text = found().model_dump_json()
    assert "no way by" in text
    assert "no answer" in text
    assert "secret-1" not in text
    assert "pw@" not in text


def test_a_finding_counts_however_many_notes_there_are(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(look: preflight_checks.Look) -> None:
        look.unchecked += ["a note"] * 40
        raise TrainerError(FailureClass.STORAGE_DENIED, "no way")

    monkeypatch.setattr(preflight_job, "CHECKS", (Check(many, "spec.storage"),))
    result = found()
    assert the(result).message == "no way"
    assert len(result.unchecked) == 16


def test_it_looks_at_what_the_run_began_with(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []
    monkeypatch.setattr(preflight_job, "CHECKS", (Check(lambda look: seen.append(look.job), ""),))
    given = job({"spec.model.uri": "hf://org/a", "spec.data.train.uri": "hf://org/b"})
    preflight(given.model_copy(update={"resolved": Inputs(model_revision="1" * 40, data_revision="2" * 40)}), here=True)
    work = seen[0].spec.workload()
    assert work.data.train is not None
    assert (work.model.revision, work.data.train.revision) == ("1" * 40, "2" * 40)


def test_what_may_pass_by_itself_holds_no_run_back(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    result = found({"spec.model.uri": "hf://org/model"})
    assert result.findings == ()
    assert result.unchecked == ("spec.model.uri: the Hub cannot be asked about hf://org/model from here",)


def test_a_check_that_never_ends_is_left(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    hangs = Check(lambda _: threading.Event().wait(60) and None, "spec.storage", seconds=0.05)
    monkeypatch.setattr(preflight_job, "CHECKS", (hangs,))
    assert found().unchecked == ("spec.storage: no answer within 0 s",)


def test_the_longest_result_fits_a_termination_message() -> None:
    finding = Finding(
        failure_class=FailureClass.DATA_INVALID, field="spec.data" * 20, message="\U0001f680" * 1000, remedy="ü" * 1000
    )
    result = PreflightResult(run_uid="u" * 64, findings=(finding,) * 16, unchecked=("\U0001f680" * 1000,) * 16)
    text = result.to_message()
    assert len(text.encode()) <= MESSAGE_BYTES
    read = PreflightResult.model_validate_json(text)
    assert read.findings[0].failure_class is FailureClass.DATA_INVALID
    assert read.findings[0].message.startswith("\U0001f680")


def test_what_may_pass_by_itself_is_no_finding() -> None:
    with pytest.raises(ValueError, match="Preempted may pass by itself"):
        Finding(failure_class=FailureClass.PREEMPTED, field="spec", message="m", remedy="r")
