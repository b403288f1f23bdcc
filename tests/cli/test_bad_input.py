"""What a user gets wrong, and what `dsft` says: exit code, the field or file, and the way out. One row a mistake.

Nothing may be started for it: manifests are judged without a process, and inputs by a driver in which importing torch or Ray
is an error.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from dsft_api.conditions import ExitCode
from dsft_cli import app as cli
from dsft_cli.devices import Machine
from tests.cli.command import Dsft, Ended, classifier, edited
from tests.s3_server import S3Server
from tests.trainer import tiny

SECRET = "hf_" + "s" * 34
BAD, DENIED = ExitCode.BAD_INPUT, ExitCode.ACCESS


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A right one."""
    folder = tmp_path_factory.mktemp("inputs")
    return classifier(tiny.bert(folder / "bert"), tiny.dataset(folder, "classification"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSFT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(gpus=0, cores=2))
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Mistake(NamedTuple):
    """Edits of a right manifest, and what must be said."""

    edits: Mapping[str, Any]
    says: tuple[str, ...]


GPU_POOL = {"spec.execution": {"microBatchSize": 8}, "spec.training.precision": "bf16"}

IN_THE_MANIFEST = {
    "an unknown field": Mistake({"spec.training.epoch": 3}, ("spec.training.epoch", "did you mean epochs?", "rename")),
    "a batch that no 2 ranks can share": Mistake(
        {"spec.training.globalBatchSize": 7, "spec.execution.microBatchSize": 1},
        ("spec.training.globalBatchSize", "2 ranks", "rank counts that fit: 1, 7", "globalBatchSize to 6 or 8"),
    ),
    "a batch that no 6 nodes can share": Mistake(
        {
            **GPU_POOL,
            "spec.training.globalBatchSize": 64,
            "spec.nodePools": [{"name": "gpu", "nodes": 6, "gpusPerNode": 2}],
        },
        (
            "spec.training.globalBatchSize: globalBatchSize 64",
            "12 ranks",
            "rank counts that fit: 1, 2, 4, 8",
            "2 GPUs per node: 1, 2, 4",
        ),
    ),
    "a DeepSpeed key that no longer exists": Mistake(
        {"spec.deepspeed.config": {"curriculum_learning": {}}},
        ("spec.deepspeed.config.curriculum_learning", "was removed from DeepSpeed", "remove it"),
    ),
    "a DeepSpeed key that the manifest decides": Mistake(
        {"spec.deepspeed.config": {"train_micro_batch_size_per_gpu": 4}},
        ("spec.deepspeed.config.train_micro_batch_size_per_gpu", "remove it; use spec.execution.microBatchSize"),
    ),
    "fp16 on device cpu": Mistake(
        {"spec.training.precision": "fp16"}, ("spec.training.precision", "'fp16'", "use bf16 or fp32")
    ),
    "a model of an unknown scheme": Mistake(
        {"spec.model.uri": "gs://bucket/model"}, ("spec.model.uri", "gs:// is not known here", "hf://, s3://")
    ),
    "storage of an unknown scheme": Mistake(
        {"spec.storage.uri": "gs://bucket/runs"}, ("spec.storage.uri", "gs:// is not known here", "s3://, file://")
    ),
    "a secret in plain text": Mistake(
        {"spec.env": [{"name": "HF_TOKEN", "value": SECRET}]},
        ("spec.env[0].value", "HF_TOKEN looks like a secret", "valueFrom: {secretKeyRef:"),
    ),
    "a secret that this machine lacks": Mistake(
        {"spec.env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]},
        ("spec.env[0].valueFrom", "HF_TOKEN comes from a Secret", "export HF_TOKEN before"),
    ),
    "S3 keys that this machine lacks": Mistake(
        {"spec.storage": {"uri": "s3://bucket/runs", "credentials": {"secretName": "s3"}}},
        ("spec.storage.credentials.secretName", "export AWS_ACCESS_KEY_ID", "export AWS_SECRET_ACCESS_KEY"),
    ),
    "a suspended run": Mistake({"spec.suspend": True}, ("spec.suspend", "is suspended", "set it to false")),
    "a program of one's own": Mistake(
        {"spec.program": {"entrypoint": "a:b"}, "spec.model": None, "spec.data": None, "spec.training": None},
        ("spec.checkpoint.everySteps", "has no effect with spec.program", "use spec.program.config"),
    ),
    "targets of LoRA": Mistake(
        {"spec.training.lora": {"targetModules": "q_proj v_proj"}},
        ("spec.training.lora.targetModules", "names no modules", "separated by commas"),
    ),
    "offload": Mistake(
        {"spec.deepspeed.offload": {"params": "cpu"}},
        ("spec.deepspeed.offload.params", "is not built yet", "write none"),
    ),
}


@pytest.mark.parametrize("mistake", IN_THE_MANIFEST.values(), ids=IN_THE_MANIFEST)
def test_a_mistake_in_the_manifest(mistake: Mistake, manifest: dict[str, Any], here: Path) -> None:
    file = Dsft(here).write(edited(manifest, mistake.edits))
    result = CliRunner().invoke(cli.app, ["run", "-f", file])
    assert result.exit_code == BAD, result.output
    for part in (file, *mistake.says):
        assert part in result.output
    assert SECRET not in result.output
    assert not (here / "runs").exists()


def test_a_manifest_that_is_not_there(here: Path) -> None:
    result = CliRunner().invoke(cli.app, ["validate", "-f", "nowhere.yaml"])
    assert result.exit_code == BAD
    assert "--filename: cannot be read: No such file or directory (got 'nowhere.yaml')" in result.output


def test_a_manifest_that_is_not_text(here: Path) -> None:
    (here / "run.yaml").write_bytes(b"\xff\xfe\x00")
    result = CliRunner().invoke(cli.app, ["validate", "-f", "run.yaml"])
    assert result.exit_code == BAD
    assert "not UTF-8" in result.output


def test_a_runtime_that_does_not_exist(manifest: dict[str, Any], here: Path) -> None:
    result = CliRunner().invoke(cli.app, ["run", "-f", Dsft(here).write(manifest), "--runtime", "slurm"])
    assert result.exit_code == BAD
    assert "--runtime: unknown runtime (got 'slurm') -> write ray or torchrun" in result.output


# What a mistake is made of: spoils a folder and says how the manifest must change to meet it.
Spoil = Callable[[Path], Mapping[str, Any]]


def data(content: bytes | str, **edits: Any) -> Spoil:
    """Training data of this content."""

    def spoil(folder: Path) -> Mapping[str, Any]:
        path = folder / "data.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"spec.data.train.uri": path.as_uri(), **edits}

    return spoil


def model_without_config(folder: Path) -> Mapping[str, Any]:
    (folder / "model").mkdir()
    return {"spec.model.uri": (folder / "model").as_uri()}


def storage_is_a_file(folder: Path) -> Mapping[str, Any]:
    (folder / "taken").write_text("a file")
    return {"spec.storage.uri": (folder / "taken").as_uri()}


def messages_without_template(folder: Path) -> Mapping[str, Any]:
    return {
        "spec.model": {"uri": tiny.llama(folder / "llama").as_uri(), "task": "causal-lm"},
        "spec.data.train": {"uri": tiny.dataset(folder, "messages").as_uri(), "format": "messages"},
    }


ROW = '{"text": "a", "label": 0}\n'

IN_THE_INPUTS: dict[str, tuple[Spoil, ExitCode, tuple[str, ...]]] = {
    "no such data file": (
        lambda folder: {"spec.data.train.uri": "file:///nowhere/train.jsonl"},
        BAD,
        ("/nowhere/train.jsonl does not exist", "check file:///nowhere/train.jsonl"),
    ),
    "a missing column": (
        data('{"text": "a", "lable": 0}\n'),
        BAD,
        ("data.jsonl has no column label (nearest: lable)", "name the column in spec.data.train.columns.label"),
    ),
    "no rows": (data(""), BAD, ("data.jsonl holds no rows", "check spec.data.train.uri")),
    "a row that is not UTF-8": (
        data(ROW.encode() * 2 + b'{"text": "\xff", "label": 0}\n'),
        BAD,
        ("data.jsonl line 3 is not UTF-8", "save the file as UTF-8"),
    ),
    "a row that is not JSON": (data(ROW + "text\n"), BAD, ("data.jsonl line 2 is not JSON", "one JSON object a line")),
    "a label out of range": (
        data(ROW * 8 + '{"text": "a", "label": 2}\n'),
        BAD,
        ("row 8: label 2 is outside 0..1", "raise spec.model.numLabels from 2"),
    ),
    "fewer rows than one batch": (
        data(ROW * 5, **{"spec.data.evalFraction": None, "spec.evaluation": None, "spec.checkpoint": None}),
        BAD,
        ("has 5 rows, fewer than spec.training.globalBatchSize 8", "lower globalBatchSize to 5 or less, or add rows"),
    ),
    "flash attention, and no GPU here": (
        lambda folder: {
            "spec.execution.attention": "flash_attention_2",
            "spec.execution.device": "auto",
            "spec.training.precision": "bf16",
        },
        BAD,
        ("spec.execution.attention", "flash_attention_2 runs on GPUs only", "sdpa or eager"),
    ),
    "fp16, and no GPU here": (
        lambda folder: {"spec.training.precision": "fp16", "spec.execution.device": "auto"},
        BAD,
        ("spec.training.precision", "fp16 runs on GPUs only", "bf16 or fp32"),
    ),
    "a model without config.json": (
        model_without_config,
        DENIED,
        ("model lacks config.json or *.safetensors", "save_pretrained"),
    ),
    "messages for a tokenizer without chat template": (
        messages_without_template,
        BAD,
        ("spec.data.train.format is messages", "no chat template", "spec.data.chatTemplate.fromModel"),
    ),
    "storage that is a file": (
        storage_is_a_file,
        DENIED,
        ("taken/default/tiny-", "spec.storage.uri: it must name a folder"),
    ),
}


@pytest.fixture
def dsft(tmp_path: Path) -> Dsft:
    """A command in whose processes torch and Ray cannot be imported, on a machine without GPUs."""
    for name in ("torch", "ray"):
        (tmp_path / "shims" / name).mkdir(parents=True)
        (tmp_path / "shims" / name / "__init__.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    return Dsft(tmp_path, {"PYTHONPATH": str(tmp_path / "shims"), "CUDA_VISIBLE_DEVICES": ""})


def test_nothing_wrong_goes_on_to_ray(manifest: dict[str, Any], dsft: Dsft) -> None:
    """The counter-proof to all of the following."""
    assert "ray was imported" in dsft("run", "-f", dsft.write(manifest)).text


def assert_refused(ended: Ended, code: ExitCode, says: tuple[str, ...]) -> None:
    assert ended.code == code, ended.text
    for part in says:
        assert part in ended.text
    assert "was imported" not in ended.text


@pytest.mark.parametrize(("spoil", "code", "says"), IN_THE_INPUTS.values(), ids=IN_THE_INPUTS)
def test_a_mistake_in_the_inputs(
    spoil: Spoil, code: ExitCode, says: tuple[str, ...], manifest: dict[str, Any], dsft: Dsft
) -> None:
    file = dsft.write(edited(manifest, spoil(dsft.folder)))
    assert_refused(dsft("run", "-f", file), code, says)


@pytest.mark.parametrize(
    ("bucket", "secret_key", "says"),
    [
        ("dsft-tests", "wrong", ("s3://dsft-tests/runs", "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
        ("no-such-bucket", None, ("s3://no-such-bucket/runs", "create the bucket, or correct spec.storage.uri")),
    ],
    ids=["wrong key", "missing bucket"],
)
def test_storage_on_s3_that_is_denied(
    bucket: str,
    secret_key: str | None,
    says: tuple[str, ...],
    manifest: dict[str, Any],
    dsft: Dsft,
    s3_server: S3Server,
    s3_bucket: str,
) -> None:
    keys = s3_server.env() | ({"AWS_SECRET_ACCESS_KEY": secret_key} if secret_key else {})
    dsft = Dsft(dsft.folder, {**dsft.env, **keys})
    file = dsft.write(edited(manifest, {"spec.storage.uri": f"s3://{bucket}/runs"}))
    assert_refused(dsft("run", "-f", file), DENIED, says)
