"""What is wrong with storage, model or data is seen by the driver, in seconds, and named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.errors import TrainerError
from dsft_trainer.pins import pinned
from dsft_trainer.preflight import preflight
from tests.s3_server import S3Server
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt

Refused = Callable[..., TrainerError]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(tmp_path: Path, model: Path) -> Refused:
    """What the driver's first looks say of a manifest that is right but for what is given."""

    def judge(*, storage: str | None = None, model_uri: str | None = None, train: str | None = None) -> TrainerError:
        document = causal_lm("tiny", model, tiny.dataset(tmp_path / "data", "text", 8), steps=1)["spec"]
        document["model"]["uri"] = model_uri or document["model"]["uri"]
        document["data"]["train"]["uri"] = train or document["data"]["train"]["uri"]
        job = first_attempt(document, storage=storage or (tmp_path / "runs").as_uri())
        with pytest.raises(TrainerError) as caught:
            first_looks(job, tmp_path / "cache")
        return caught.value

    return judge


def first_looks(job: Job, cache: Path) -> None:
    preflight(job, cache)
    pinned(job, Inputs())


def test_a_wrong_key(refused: Refused, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    error = refused(storage=s3_uri)
    assert error.failure_class is FailureClass.STORAGE_DENIED
    assert f"cannot write {s3_uri}" in error.message
    assert "InvalidAccessKeyId" in error.message
    assert "AWS_ACCESS_KEY_ID" in error.remedy


def test_a_wrong_secret(refused: Refused, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    error = refused(storage=s3_uri)
    assert error.failure_class is FailureClass.STORAGE_DENIED
    assert "SignatureDoesNotMatch" in error.message


def test_a_bucket_that_is_not_there(refused: Refused, s3_uri: str, s3_server: S3Server) -> None:
    error = refused(storage="s3://nobody-made-it/runs")
    assert error.failure_class is FailureClass.STORAGE_DENIED
    assert "cannot write s3://nobody-made-it/runs" in error.message
    assert s3_server.endpoint in error.message
    assert "NoSuchBucket" in error.message
    assert "create the bucket" in error.remedy


@pytest.mark.parametrize(
    ("what", "kind"), [("train", FailureClass.DATA_INVALID), ("model_uri", FailureClass.MODEL_DENIED)]
)
class TestNotThere:
    def test_on_s3(self, refused: Refused, s3_uri: str, what: str, kind: FailureClass) -> None:
        error = refused(**{what: f"{s3_uri}/nothing"})
        assert error.failure_class is kind
        assert f"{s3_uri}/nothing holds no objects" in error.message

    def test_in_files(self, refused: Refused, tmp_path: Path, what: str, kind: FailureClass) -> None:
        error = refused(**{what: (tmp_path / "nothing.jsonl").as_uri()})
        assert error.failure_class is kind
        assert f"{tmp_path / 'nothing.jsonl'} does not exist" in error.message

    def test_in_packages(self, refused: Refused, what: str, kind: FailureClass) -> None:
        error = refused(**{what: "python://no_such_package/x"})
        assert error.failure_class is kind
        assert "no_such_package" in error.message


def test_a_folder_without_a_model_on_s3(refused: Refused, s3_uri: str) -> None:
    open_store(s3_uri).put_bytes("config.json", b"{}")
    error = refused(model_uri=s3_uri)
    assert error.failure_class is FailureClass.MODEL_DENIED
    assert "lacks config.json or *.safetensors" in error.message
