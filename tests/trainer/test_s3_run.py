"""A run that lives on S3 alone: model, data and storage; and the server dies while a checkpoint is on its way."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsft_api.conditions import ExitCode
from tests.cli.command import Dsft, classifier
from tests.s3_server import READER, S3Server
from tests.trainer import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 12


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    """A server of its own: it will be killed."""
    server = S3Server.start(tmp_path / "server")
    yield server
    server.stop()


def upload(server: S3Server, bucket: str, folder: Path) -> None:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        server.client().upload_file(str(path), bucket, path.relative_to(folder).as_posix())


def phase(dsft: Dsft) -> str | None:
    """What the trainer told last that it does."""
    told = [json.loads(path.read_text()) for path in dsft.runs.glob("*/*/channel/dsft-progress.json")]
    return told[0]["phase"] if told else None


def test_a_run_outlives_the_s3_server_that_dies_under_a_checkpoint(tmp_path: Path, server: S3Server) -> None:
    inputs = tmp_path / "inputs"
    tiny.bert(inputs / "model")
    tiny.dataset(inputs / "data", "classification", 64)
    bucket = server.make_bucket("fine-tuning")
    upload(server, "fine-tuning", inputs)
    manifest = classifier(
        Path("/model"),
        Path("/data"),
        **{
            "spec.model.uri": f"{bucket}/model",
            "spec.data.train.uri": f"{bucket}/data/classification.jsonl",
            "spec.training.maxSteps": STEPS,
            "spec.storage": {"uri": f"{bucket}/runs", "endpointUrl": server.endpoint, "region": "us-east-1"},
        },
    )
    keys = {
        name: value for name, value in server.env().items() if name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    }
    dsft = Dsft(tmp_path / "dsft", keys)
    (tmp_path / "dsft").mkdir()

    with dsft.start("run", "-f", dsft.write(manifest), "--runtime", "torchrun", "-o", "json") as running:
        running.until(lambda: phase(dsft) == "saving")
        server.kill()
        assert phase(dsft) == "saving", "the checkpoint was committed before the server died"
        server.restart()
        ended = running.wait()

    assert ended.code == ExitCode.OK, ended.text
    status = json.loads(ended.out)["status"]
    assert status["phase"] == "Succeeded"
    assert len(status["attempts"]) == 1
    prefix = status["resolved"]["storagePrefix"]
    assert prefix.startswith(f"{bucket}/runs/default/tiny-")
    listed = dsft("ls", prefix, "--endpoint-url", server.endpoint, "--region", "us-east-1", "-o", "json")
    commits = json.loads(listed.out)
    assert commits[-1]["name"] == f"step-{STEPS:08d}-a1.g1"
    assert [commit["name"] for commit in commits] == [
        c["uri"].rpartition("/")[2] for c in status["checkpoints"]["retained"]
    ]
    keys_stored = {entry["Key"] for entry in server.client().list_objects_v2(Bucket="fine-tuning")["Contents"]}
    run = prefix.removeprefix(f"{bucket}/")
    assert {f"{run}/RESULT.json", f"{run}/export/model.safetensors", f"{run}/export/manifest.json"} <= keys_stored


def test_a_key_that_may_only_read_is_refused_before_anything_starts(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    model, data = tiny.bert(tmp_path / "model"), tiny.dataset(tmp_path, "classification")
    dsft = Dsft(tmp_path, s3_server.env(READER))
    ended = dsft("run", "-f", dsft.write(classifier(model, data, **{"spec.storage": {"uri": f"{s3_bucket}/runs"}})))
    assert ended.code == ExitCode.ACCESS, ended.text
    assert f"StorageDenied: cannot write {s3_bucket}/runs" in ended.err
    assert "AccessDenied" in ended.err
