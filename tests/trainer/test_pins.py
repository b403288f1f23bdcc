"""What the first attempt finds the inputs to be binds every later one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from dsft_api.conditions import FailureClass
from dsft_api.job import Job, Ranks, RunRef
from dsft_api.spec import FineTuneSpec
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.driver import first_come
from dsft_trainer.errors import TrainerError
from dsft_trainer.pins import data_digest, pinned
from tests.trainer import tiny
from tests.trainer.runs import causal_lm

NEW = Inputs()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.dataset(tmp_path / "data", "text", 8)


def job_on(train: str, model: str = "file:///model", **data: object) -> Job:
    """An attempt on this data."""
    document = causal_lm("tiny", Path("/model"), Path("/text"), steps=1)["spec"]
    document["model"]["uri"] = model
    document["data"]["train"]["uri"] = train
    document["data"] |= data
    return Job(
        run=RunRef(namespace="default", name="tiny", uid="u"),
        attempt=1,
        spec=FineTuneSpec.model_validate(document),
        spec_hash="sha256:0",
        storage_prefix="file:///runs",
        ranks=Ranks(count=1, device="cpu", threads=1),
    )


def resolved(job: Job, known: Inputs = NEW) -> Inputs:
    found = pinned(job, known).resolved
    assert found is not None
    return found


def test_the_digest_is_that_of_the_content(rows: Path) -> None:
    job = job_on(rows.as_uri())
    first = resolved(job).data_digest
    assert first is not None
    assert first.startswith("sha256:")
    text = rows.read_text()
    rows.unlink()
    rows.write_text(text)
    assert resolved(job).data_digest == first
    rows.write_text(text.replace("ship", "boat", 1))
    assert resolved(job).data_digest != first


def test_a_folder_counts_as_a_whole(rows: Path) -> None:
    job = job_on(rows.parent.as_uri())
    first = data_digest(job)
    (rows.parent / ".hidden").write_text("x")
    assert data_digest(job) == first
    tiny.write_jsonl(rows.parent / "more.jsonl", tiny.rows("text", 1))
    assert data_digest(job) != first


def test_evaluation_data_counts_too(rows: Path, tmp_path: Path) -> None:
    held_out = tiny.dataset(tmp_path / "eval", "text", 2)
    job = job_on(rows.as_uri(), eval={"uri": held_out.as_uri()})
    first = data_digest(job)
    assert first != data_digest(job_on(rows.as_uri()))
    tiny.dataset(tmp_path / "eval", "text", 3)
    assert data_digest(job) != first


def test_other_data_is_refused_by_both_digests(rows: Path) -> None:
    job = job_on(rows.as_uri())
    known = resolved(job)
    tiny.dataset(rows.parent, "text", 9)
    with pytest.raises(TrainerError) as caught:
        pinned(job, known)
    assert caught.value.failure_class is FailureClass.DATA_INVALID
    assert str(known.data_digest) in caught.value.message
    assert str(data_digest(job)) in caught.value.message


def test_run_json_binds_the_next_attempt(rows: Path, tmp_path: Path) -> None:
    job = job_on(rows.as_uri()).model_copy(update={"storage_prefix": (tmp_path / "run").as_uri()})
    first = first_come(job)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first.resolved is not None
    assert written["resolved"] == first.resolved.to_wire()
    other = job.ranks.model_copy(update={"threads": 7})
    again = first_come(job.model_copy(update={"attempt": 2, "ranks": other}))
    assert (again.resolved, again.ranks) == (first.resolved, first.ranks)
    tiny.dataset(rows.parent, "text", 9)
    with pytest.raises(TrainerError, match="the data is not what the run began with"):
        first_come(job)


def test_what_the_operator_says_binds_where_run_json_is_lost(rows: Path, tmp_path: Path) -> None:
    job = job_on(rows.as_uri()).model_copy(update={"storage_prefix": (tmp_path / "run").as_uri()})
    told = Inputs(data_digest="sha256:of-another-day")
    with pytest.raises(TrainerError, match="sha256:of-another-day"):
        first_come(job.model_copy(update={"resolved": told}))


@pytest.mark.parametrize("place", ["", "/text.jsonl"])
def test_objects_count_by_etag(rows: Path, s3_uri: str, place: str) -> None:
    store, job = open_store(s3_uri), job_on(s3_uri + place)
    text = rows.read_bytes()
    store.put_bytes("text.jsonl", text)
    first = data_digest(job)
    store.put_bytes("text.jsonl", text)
    assert data_digest(job) == first
    store.put_bytes("text.jsonl", text.replace(b"ship", b"boat"))
    assert data_digest(job) != first


def test_data_that_is_not_there_is_named(s3_uri: str) -> None:
    with pytest.raises(TrainerError) as caught:
        pinned(job_on(f"{s3_uri}/none.jsonl"), NEW)
    assert caught.value.failure_class is FailureClass.DATA_INVALID
    assert f"{s3_uri}/none.jsonl holds no objects" in caught.value.message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A Hub that knows the newest commits of these repositories, by path: `models/org/name`."""
    commits: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            commit = commits.get(self.path.removeprefix("/api/"))
            body = json.dumps({"id": "org/name", "sha": commit} if commit else {"error": "not found"}).encode()
            self.send_response(200 if commit else 404)
            if not commit:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield commits
    server.shutdown()
    server.server_close()


def test_branches_on_the_hub_become_commits_and_stay_so(hub: dict[str, str]) -> None:
    model, data = "1" * 40, "2" * 40
    hub |= {"models/org/name": model, "datasets/org/rows": data}
    job = job_on("hf://org/rows", "hf://org/name")
    begun = pinned(job, NEW)
    assert begun.resolved is not None
    assert (begun.resolved.model_revision, begun.resolved.data_revision) == (model, data)
    work = begun.spec.workload()
    assert (work.model.revision, work.train.revision) == (model, data)

    hub |= {"models/org/name": "3" * 40, "datasets/org/rows": "4" * 40}
    assert pinned(job, begun.resolved).resolved == begun.resolved


def test_a_model_that_is_not_there_is_denied(hub: dict[str, str], rows: Path) -> None:
    with pytest.raises(TrainerError) as caught:
        pinned(job_on(rows.as_uri(), "hf://org/none"), NEW)
    assert caught.value.failure_class is FailureClass.MODEL_DENIED
    assert "hf://org/none does not exist on the Hub, or is private" in caught.value.message


def test_a_hub_out_of_reach_pins_nothing(monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    """The node's cache may have the model."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    found = resolved(job_on(rows.as_uri(), "hf://org/name"))
    assert found.model_revision is None
    assert found.data_digest is not None
