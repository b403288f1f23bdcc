"""What the preflight finds before there is a GPU: each fault named, all of them at once, in a document that fits its place."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import ExitCode, FailureClass
from dsft_api.job import Job
from dsft_api.layout import PREFLIGHT_FILE
from dsft_api.preflight import PreflightResult
from dsft_trainer import preflight_checks, preflight_job
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data import first_rows as first
from dsft_trainer.preflight_job import Check
from tests.s3_faults import faulty
from tests.s3_server import READER, S3Server
from tests.trainer import tiny
from tests.trainer.hub_double import hub
from tests.trainer.preflight.looks import Edits, Found, in_process, the

NOTHING_TRAINED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% generation %}{% endgeneration %}"
POOL = {"name": "gpu", "gpusPerNode": 1}


def test_a_run_that_is_right(found: Found, tmp_path: Path) -> None:
    result = found()
    assert result == PreflightResult(run_uid="u")
    kept = json.loads((tmp_path / "runs" / PREFLIGHT_FILE).read_text())
    assert kept["findings"] == []
    tokens, _, text = kept["sample"].partition(": ")
    assert tokens.endswith(" trained")
    assert "<|im_start|>user\nWhat is the ship?<|im_end|>\n" in text, "the question is not trained on"
    assert "<|im_start|>assistant\n[[The ship was seen in the morning.<|im_end|>\n]]" in text
    assert [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()] == [PREFLIGHT_FILE]


# What stands in the way -> class, field, words of the message, words of the remedy.
IN_THE_SPEC: dict[str, tuple[Edits, FailureClass, str, str, str]] = {
    "no model": (
        {"spec.model.uri": "file:///nowhere/model"},
        FailureClass.MODEL_DENIED,
        "spec.model",
        "/nowhere/model does not exist",
        "mounted",
    ),
    "no data set": (
        {"spec.data.train.uri": "file:///nowhere/rows.jsonl"},
        FailureClass.DATA_INVALID,
        "spec.data.train",
        "/nowhere/rows.jsonl does not exist",
        "mounted",
    ),
    "wrong columns": (
        {"spec.data.train.columns": {"messages": "turns"}},
        FailureClass.DATA_INVALID,
        "spec.data.train",
        "no column turns",
        "spec.data.train.columns.messages",
    ),
    "a template that trains nothing": (
        {"spec.data.chatTemplate": {"template": NOTHING_TRAINED}},
        FailureClass.DATA_INVALID,
        "spec.data",
        "nothing to train on",
        "drop the row",
    ),
    "a template that is broken": (
        {"spec.data.chatTemplate": {"template": "{% for m in messages %}"}},
        FailureClass.DATA_INVALID,
        "spec.data",
        "the chat template cannot render it",
        "spec.data.chatTemplate",
    ),
    "no other run": (
        {"spec.startFrom": {"run": "nobody"}},
        FailureClass.CONFIG_INVALID,
        "spec.startFrom",
        "there is no run nobody",
        "same spec.storage.uri",
    ),
    "a batch that does not divide": (
        {"spec.execution.microBatchSize": 3},
        FailureClass.CONFIG_INVALID,
        "spec.training",
        "globalBatchSize 8 cannot be divided",
        "microBatchSize",
    ),
}


def test_what_one_of_several_data_sets_gets_wrong(found: Found, tmp_path: Path) -> None:
    good, bad = tiny.dataset(tmp_path, "text", 8), tiny.write_jsonl(tmp_path / "bad.jsonl", [{"text": None}])
    members = [{"uri": path.as_uri(), "format": "text"} for path in (good, bad)]
    finding = the(found({"spec.data": {"mixture": members}}))
    assert (finding.failure_class, finding.field) == (FailureClass.DATA_INVALID, "spec.data.mixture[1]")
    assert "column text is empty" in finding.message


@pytest.mark.parametrize("fault", IN_THE_SPEC)
def test_what_the_spec_gets_wrong(found: Found, fault: str) -> None:
    edits, kind, field, message, remedy = IN_THE_SPEC[fault]
    finding = the(found(edits))
    assert (finding.failure_class, finding.field) == (kind, field)
    assert message in finding.message
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("rows", "message", "remedy"),
    [
        ([{"text": "a", "label": 0}, {"text": "b", "label": 7}], "label 7 is outside 0..1", "spec.model.numLabels"),
        ([{"text": "a", "labels": 0}], "has no column label (nearest: labels)", "spec.data.train.columns.label"),
    ],
    ids=["label out of range", "another name"],
)
def test_what_the_labels_get_wrong(
    found: Found, classifier: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str, remedy: str
) -> None:
    data = tiny.write_jsonl(tmp_path / "labelled.jsonl", rows)
    edits = {
        "spec.model": {"uri": classifier.as_uri(), "task": "sequence-classification"},
        "spec.data.train": {"uri": data.as_uri(), "format": "classification"},
    }
    finding = the(found(edits))
    assert finding.failure_class is FailureClass.DATA_INVALID
    assert message in finding.message
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"), (None, "AccessDenied")],
    ids=["a wrong key", "a prefix that may be read only"],
)
def test_keys_that_do_not_let_it_write(
    found: Found,
    s3_uri: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str] | None,
    message: str,
) -> None:
    for name, value in (variables or s3_server.env(READER)).items():
        monkeypatch.setenv(name, value)
    finding = the(found(storage=f"{s3_uri}/run"))
    assert (finding.failure_class, finding.field) == (FailureClass.STORAGE_DENIED, "spec.storage")
    assert message in finding.message
    assert READER.secret_key not in finding.model_dump_json()


def test_a_server_that_has_no_time_now_holds_no_run_back(found: Found, s3_uri: str, s3_server: S3Server) -> None:
    with faulty(s3_server.endpoint) as proxy:
        proxy.down_until = math.inf
        result = found({"spec.storage": {"endpointUrl": proxy.endpoint}}, f"{s3_uri}/run")
    assert result.findings == ()
    assert [note.partition(":")[0] for note in result.unchecked] == ["spec.storage"]


def test_a_bucket_that_is_not_there(found: Found, s3_uri: str) -> None:
    finding = the(found(storage="s3://nobody-made-it/runs"))
    assert finding.failure_class is FailureClass.STORAGE_DENIED
    assert "NoSuchBucket" in finding.message
    assert "create the bucket" in finding.remedy


def test_keys_that_may_not_delete(found: Found, s3_uri: str, s3_server: S3Server) -> None:
    """Else the run would find that out at its third checkpoint."""
    with faulty(s3_server.endpoint) as proxy:
        proxy.refuse = lambda method, _: method == "DELETE"
        finding = the(found({"spec.storage": {"endpointUrl": proxy.endpoint}}, f"{s3_uri}/run"))
    assert finding.failure_class is FailureClass.STORAGE_DENIED
    assert "cannot delete" in finding.message
    assert "s3:DeleteObject" in finding.remedy


def test_a_module_that_is_not_in_the_image(found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_SCRATCH", str(tmp_path))
    gone = dict.fromkeys(f"spec.{part}" for part in ("model", "data", "training"))
    program = {"entrypoint": "no_such_package.train:main"}
    finding = the(found({"spec.program": program, **gone}))
    assert (finding.failure_class, finding.field) == (FailureClass.CONFIG_INVALID, "spec.program")
    assert "there is no module no_such_package" in finding.message
    source = {"archive": (tmp_path / "code.tar.gz").as_uri(), "digest": f"sha256:{'0' * 64}"}
    assert "code.tar.gz does not exist" in the(found({"spec.program": {**program, "source": source}, **gone})).message


def test_what_a_package_imports_is_not_the_module(
    found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that wants a GPU's libraries can be imported where there is a GPU."""
    (tmp_path / "gpu_only" / "__init__.py").parent.mkdir()
    (tmp_path / "gpu_only" / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    gone = dict.fromkeys(f"spec.{part}" for part in ("model", "data", "training"))
    assert found({"spec.program": {"entrypoint": "gpu_only.train:main"}, **gone}).findings == ()


def test_a_scratch_disk_that_is_too_small(found: Found, model: Path, s3_uri: str) -> None:
    store = open_store(f"{s3_uri}/model")
    for path in model.iterdir():
        store.put_bytes(path.name, path.read_bytes())
    pool = {**POOL, "scratch": {"size": "100Ki"}}
    edits = {"spec.model.uri": f"{s3_uri}/model", "spec.nodePools": [pool]}
    finding = the(found(edits, f"{s3_uri}/run"))
    assert finding.failure_class is FailureClass.CONFIG_INVALID
    assert "spec.nodePools[0].scratch.size is 0.1 MB, and the model (0." in finding.message
    assert finding.remedy == "raise spec.nodePools[0].scratch.size"
    assert found({**edits, "spec.nodePools": [{**POOL, "scratch": {"size": "1Gi"}}]}, f"{s3_uri}/run").findings == ()


def test_a_shared_memory_that_is_too_small(job: Callable[..., Job]) -> None:
    """On a real /dev/shm of a container's default size, in a namespace of its own."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$0" -m dsft_trainer preflight'
    if subprocess.run([*mount, "mount -t tmpfs none /mnt"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount in a user namespace")
    done = in_process([*mount, script, sys.executable], job({"spec.nodePools": [{**POOL, "gpusPerNode": 8}]}))
    assert done.returncode == ExitCode.BAD_INPUT
    finding = the(PreflightResult.model_validate_json(done.stdout.splitlines()[-1]))
    assert "/dev/shm has 67.1 MB, and the ranks of a node need 604.0 MB" in finding.message
    assert "spec.nodePools[].resources" in finding.remedy


@pytest.mark.parametrize(
    ("uri", "message", "remedy"),
    [
        ("hf://org/gated", "is gated", "accept its terms"),
        ("hf://org/none", "does not exist on the Hub, or is private", "check the name"),
    ],
)
def test_a_model_of_the_hub_that_may_not_be_read(
    job: Callable[..., Job], model: Path, tmp_path: Path, uri: str, message: str, remedy: str
) -> None:
    """In a process of its own: the Hub's library reads these variables when it is imported."""
    with hub({"org/gated": model, "org/open": model}, frozenset({"org/gated"})) as endpoint:
        command = [sys.executable, "-m", "dsft_trainer", "preflight"]
        done = in_process(command, job({"spec.model.uri": uri}), HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"))
    finding = the(PreflightResult.model_validate_json(done.stdout.splitlines()[-1]))
    assert done.returncode == ExitCode.ACCESS
    assert finding.failure_class is FailureClass.MODEL_DENIED
    assert message in finding.message
    assert remedy in finding.remedy
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_model_of_the_hub_that_may_be_read_is_not_fetched(
    job: Callable[..., Job], model: Path, tmp_path: Path
) -> None:
    with hub({"org/open": model}) as endpoint:
        edits = {"spec.model.uri": "hf://org/open", "spec.nodePools": [{**POOL, "scratch": {"size": "100Ki"}}]}
        command = [sys.executable, "-m", "dsft_trainer", "preflight"]
        done = in_process(command, job(edits), HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"))
    finding = the(PreflightResult.model_validate_json(done.stdout.splitlines()[-1]))
    assert "scratch.size is 0.1 MB, and the model (0." in finding.message, done.stderr
    assert list((tmp_path / "hf").rglob("tokenizer.json"))
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_weights_count_where_the_hubs_cache_is(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_job, "CHECKS", (Check(a_large_model, ""), Check(preflight_checks.disk, "")))
    edits = {"spec.model.uri": "hf://org/open", "spec.nodePools": [{**POOL, "scratch": {"size": "1Gi"}}]}
    assert "the model (" in the(found(edits)).message
    assert found({**edits, "spec.env": [{"name": "HF_HOME", "value": "/elsewhere"}]}).findings == ()


def a_large_model(look: preflight_checks.Look) -> None:
    look.to_fetch["the model"] = 2**40


def test_a_model_with_code_of_its_own_is_left_to_the_ranks(found: Found, tmp_path: Path) -> None:
    own = tiny.llama(tmp_path / "own", chat_template=tiny.CHATML)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (own / "config.json").write_text(json.dumps(config))
    edits = {"spec.model.uri": own.as_uri()}
    assert "of no model that can be loaded here" in the(found(edits)).message
    result = found({**edits, "spec.model.trustRemoteCode": True})
    assert result.findings == ()
    assert "code is not run here" in result.unchecked[0]


def test_of_large_json_lines_the_beginning_is_read(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_uri: str
) -> None:
    rows = tiny.rows("messages", 50)
    path = tiny.write_jsonl(tmp_path / "large.jsonl", [*rows, {"messages": "no conversation"}])
    monkeypatch.setattr(first, "MAX_BYTES", 5000)
    assert path.stat().st_size > 5000
    open_store(s3_uri).put_bytes("large.jsonl", path.read_bytes())
    for uri in (path.as_uri(), f"{s3_uri}/large.jsonl"):
        assert found({"spec.data.train.uri": uri}, f"{s3_uri}/run") == PreflightResult(run_uid="u")
    path.write_text("no JSON\n" + path.read_text())
    assert "line 1 is not JSON" in the(found({"spec.data.train.uri": path.as_uri()})).message


def test_of_a_large_folder_only_what_the_ranks_read_is_looked_at(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_uri: str
) -> None:
    """Not logs of a table format, older versions in a folder below, or an empty part."""
    monkeypatch.setattr(first, "MAX_BYTES", 5000)
    store = open_store(f"{s3_uri}/folder")
    good = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows("messages", 100)).read_bytes()
    others = {"_delta_log/000.jsonl": b'{"add": 1}\n', "archive/old.jsonl": b'{"old": 1}\n', ".note.jsonl": b"no JSON"}
    for name, content in {**others, "part-0.jsonl": b"", "part-1.jsonl": good}.items():
        store.put_bytes(name, content)
    assert found({"spec.data.train.uri": store.uri}, f"{s3_uri}/run") == PreflightResult(run_uid="u")
    store.put_bytes("part-1.jsonl", b"no JSON\n" + good)
    assert "line 1 is not JSON" in the(found({"spec.data.train.uri": store.uri}, f"{s3_uri}/run")).message


def test_a_disk_is_measured_where_the_ranks_run(found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSFT_SCRATCH", str(tmp_path))
    monkeypatch.setattr(preflight_job, "CHECKS", (Check(asks_for_everything, ""), Check(preflight_checks.disk, "")))
    assert found().findings == ()
    finding = the(found(here=True))
    assert f"{tmp_path} has " in finding.message
    assert "DSFT_SCRATCH" in finding.remedy


def asks_for_everything(look: preflight_checks.Look) -> None:
    look.to_fetch["data.train"] = 2**60


def test_all_faults_are_told_at_once(found: Found) -> None:
    edits = {**IN_THE_SPEC["no model"][0], **IN_THE_SPEC["no data set"][0], **IN_THE_SPEC["no other run"][0]}
    result = found(edits)
    assert [finding.field for finding in result.findings] == ["spec.startFrom", "spec.model", "spec.data.train"]
