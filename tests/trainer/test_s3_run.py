"""A run that lives on S3 alone: model, data and storage; and the server dies while a checkpoint is on its way."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import ExitCode
from tests.cli.command import Dsft, classifier
from tests.s3_faults import faulty
from tests.s3_server import READER, REGION, S3Server
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


def progress(dsft: Dsft) -> dict[str, Any]:
    """What the trainer told last."""
    told = [json.loads(path.read_text()) for path in dsft.runs.glob("*/*/channel/dsft-progress.json")]
    return told[0] if told else {}


def phase(dsft: Dsft) -> str | None:
    """What it told last that it does."""
    return progress(dsft).get("phase")


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
        # The last one: training waits for it.
        running.until(lambda: phase(dsft) == "saving" and progress(dsft)["progress"]["step"] == STEPS)
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


def test_a_refused_checkpoint_is_skipped_and_slow_ones_hold_the_run_back(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    """The first checkpoint's shards of one rank are refused; every upload takes longer than the steps between two."""
    dsft = Dsft(tmp_path, s3_server.env())
    with faulty(s3_server.endpoint) as proxy:
        proxy.refuse = lambda method, path: method == "PUT" and "step-00000002-" in path and "rank_1" in path
        proxy.seconds_per_put = 1.0
        manifest = classifier(
            tiny.bert(tmp_path / "model"),
            tiny.dataset(tmp_path, "classification"),
            **{
                "metadata.name": "refused",
                "spec.data.evalFraction": None,
                "spec.evaluation": None,
                "spec.training.maxSteps": 8,
                "spec.checkpoint": {"everySteps": 2, "keepLast": 10},
                "spec.storage": {"uri": f"{s3_bucket}/refused", "endpointUrl": proxy.endpoint, "region": REGION},
            },
        )
        with dsft.start("run", "-f", dsft.write(manifest), "--runtime", "torchrun", "-o", "json") as running:
            running.until(lambda: progress(dsft).get("checkpoints", {}).get("failures") == 1)
            told = progress(dsft)
            ended = running.wait()
    assert ended.code == ExitCode.OK, ended.text
    assert "AccessDenied: not now" in told["checkpoints"]["failure"]
    status = json.loads(ended.out)["status"]
    assert len(status["attempts"]) == 1
    assert [commit["step"] for commit in status["checkpoints"]["retained"]] == [4, 6, 8]
    assert "failures" not in status["checkpoints"]
    assert status["checkpoints"]["blockedSeconds"] > 0.5, "the last save did not wait for the one before it"
    # What arrived of the skipped one is gone.
    listed = s3_server.client().list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"), Prefix="refused/")["Contents"]
    assert not [entry["Key"] for entry in listed if "step-00000002-" in entry["Key"]]


def test_a_key_that_may_only_read_is_refused_before_anything_starts(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    model, data = tiny.bert(tmp_path / "model"), tiny.dataset(tmp_path, "classification")
    dsft = Dsft(tmp_path, s3_server.env(READER))
    ended = dsft("run", "-f", dsft.write(classifier(model, data, **{"spec.storage": {"uri": f"{s3_bucket}/runs"}})))
    assert ended.code == ExitCode.ACCESS, ended.text
    assert f"StorageDenied: cannot write {s3_bucket}/runs" in ended.err
    assert "AccessDenied" in ended.err
