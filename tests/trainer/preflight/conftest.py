"""A run that is right but for what a test gives, and the look at it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from dsft_api.job import Job
from dsft_api.preflight import PreflightResult
from dsft_trainer.preflight_job import preflight
from tests.cli.command import edited
from tests.trainer import tiny
from tests.trainer.preflight.looks import Edits, Found
from tests.trainer.runs import causal_lm, first_attempt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"), chat_template=tiny.CHATML)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Callable[..., Job]:
    """A run on 8 conversations that is right but for what is given."""

    def make(edits: Edits | None = None, storage: str | None = None) -> Job:
        document = causal_lm("tiny", model, tiny.dataset(tmp_path / "data", "messages", 8), steps=1)
        return first_attempt(edited(document, edits or {})["spec"], storage=storage or (tmp_path / "runs").as_uri())

    return make


@pytest.fixture
def found(job: Callable[..., Job], capsys: pytest.CaptureFixture[str]) -> Found:
    """The result of a run of these edits: the last line that is printed."""

    def look(edits: Edits | None = None, storage: str | None = None, *, here: bool = False) -> PreflightResult:
        code = preflight(job(edits, storage), here=here)
        result = PreflightResult.model_validate_json(capsys.readouterr().out.splitlines()[-1])
        first_finding = result.findings[0] if result.findings else None
        assert code == (first_finding.failure_class.failure.exit_code if first_finding else ExitCode.OK)
        return result

    return look
