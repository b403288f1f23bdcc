"""What the first attempt finds the inputs to be binds every later one."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import DataSpec
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data.formats import eval_source
from dsft_trainer.driver import first_come
from dsft_trainer.errors import TrainerError
from dsft_trainer.pins import data_digest, pinned, with_known_commits
from tests.http_double import HttpDouble, QuietHandler
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt

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
    return first_attempt(document)


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

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            commit = commits.get(self.path.removeprefix("/api/"))
            body = json.dumps({"id": "org/name", "sha": commit} if commit else {"error": "not found"}).encode()
            error = {} if commit else {"X-Error-Code": "RepoNotFound"}
            self.reply(200 if commit else 404, body, {"Content-Type": "application/json", **error})

    with HttpDouble(Handler) as double:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", double.uri)
        yield commits


def test_branches_on_the_hub_become_commits_and_stay_so(hub: dict[str, str]) -> None:
    model, data = "1" * 40, "2" * 40
    hub |= {"models/org/name": model, "datasets/org/rows": data}
    job = job_on("hf://org/rows", "hf://org/name")
    begun = pinned(job, NEW)
    assert begun.resolved is not None
    assert (begun.resolved.model_revision, begun.resolved.data_revision) == (model, data)
    work = begun.spec.workload()
    assert (work.model.revision, work.data.train.revision) == (model, data)

    hub |= {"models/org/name": "3" * 40, "datasets/org/rows": "4" * 40}
    assert pinned(job, begun.resolved).resolved == begun.resolved


def test_each_member_of_a_mixture_has_its_pin(hub: dict[str, str], rows: Path) -> None:
    first, second = "2" * 40, "5" * 40
    hub |= {"datasets/org/one": first, "datasets/org/two": second}
    job = job_on("file:///nowhere")
    members = [{"uri": uri, "format": "text"} for uri in ("hf://org/one", rows.as_uri(), "hf://org/two")]
    data = DataSpec.model_validate({"mixture": members})
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"data": data})})
    begun = pinned(job, NEW)
    assert begun.resolved is not None
    assert begun.resolved.mixture_revisions == (first, "", second)
    assert [source.revision for source in begun.spec.train_sources()] == [first, None, second]
    hub |= {"datasets/org/one": "3" * 40, "datasets/org/two": "4" * 40}
    assert pinned(job, begun.resolved).resolved == begun.resolved
    tiny.dataset(rows.parent, "text", 9)
    with pytest.raises(TrainerError, match="the data is not what the run began with"):
        pinned(job, begun.resolved)


@pytest.mark.parametrize(
    ("evaluated", "commits"),
    [
        ({"uri": "hf://org/held-out"}, ("5" * 40, "5" * 40)),
        ({"uri": "hf://org/held-out", "revision": "v1"}, ("5" * 40, "5" * 40)),
        # The same place as the training data, unless it says otherwise.
        ({"split": "validation"}, (None, "2" * 40)),
        ({"revision": "v2"}, ("6" * 40, "6" * 40)),
    ],
)
def test_evaluation_data_has_its_pin(
    hub: dict[str, str], evaluated: dict[str, str], commits: tuple[str | None, str]
) -> None:
    hub |= {"datasets/org/rows": "2" * 40, "datasets/org/held-out": "5" * 40}
    hub |= {"datasets/org/held-out/revision/v1": "5" * 40, "datasets/org/rows/revision/v2": "6" * 40}
    job = job_on("hf://org/rows", eval=evaluated)
    begun = pinned(job, NEW)
    known = begun.resolved
    assert known is not None
    source = eval_source(begun.spec.workload().data)
    assert source is not None
    assert (known.eval_revision, source.revision) == commits

    hub.update(dict.fromkeys(hub, "9" * 40))
    again = pinned(job, known)
    assert (again.resolved, again.spec) == (known, begun.spec)
    assert with_known_commits(job.model_copy(update={"resolved": known})).spec == begun.spec


def test_evaluation_data_that_an_older_version_did_not_pin_is_from_now_on(hub: dict[str, str], rows: Path) -> None:
    hub |= {"datasets/org/held-out": "5" * 40}
    job = job_on(rows.as_uri(), eval={"uri": "hf://org/held-out"})
    before = Inputs(data_digest=resolved(job).data_digest)
    known = resolved(job, before)
    assert known.eval_revision == "5" * 40
    hub |= {"datasets/org/held-out": "9" * 40}
    assert resolved(job, known) == known
    # What it was is not known any more, only that it is not this.
    with pytest.raises(TrainerError, match="the data is not what the run began with"):
        pinned(job, before)


def chats(template_of: str) -> Job:
    """An attempt on conversations that another model's template renders."""
    document = {"train": {"uri": "hf://org/chats", "format": "messages"}, "chatTemplate": {"fromModel": template_of}}
    job = job_on("hf://org/chats")
    spec = job.spec.model_copy(update={"data": DataSpec.model_validate(document)})
    return job.model_copy(update={"spec": spec})


@pytest.mark.parametrize("template_of", ["org/instruct", "hf://org/instruct"])
def test_the_template_of_a_model_on_the_hub_has_its_pin(hub: dict[str, str], template_of: str) -> None:
    hub |= {"datasets/org/chats": "2" * 40, "models/org/instruct": "7" * 40}
    job = chats(template_of)
    known = resolved(job)
    assert (known.template_revision, known.template_digest) == ("7" * 40, None)
    hub |= {"models/org/instruct": "8" * 40}
    assert resolved(job, known) == known
    # An older version pinned none: what is there now is what counts from now on.
    older = known.model_copy(update={"template_revision": None})
    assert resolved(job, older).template_revision == "8" * 40


def test_another_template_in_the_config_map_is_refused(hub: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    hub |= {"datasets/org/chats": "2" * 40}
    job = job_on("hf://org/chats")
    template = {"configMapRef": {"name": "templates", "key": "chatml"}}
    data = {"train": {"uri": "hf://org/chats", "format": "messages"}, "chatTemplate": template}
    job = job.model_copy(update={"spec": job.spec.model_copy(update={"data": DataSpec.model_validate(data)})})
    with pytest.raises(TrainerError, match="there is no ConfigMap here"):
        resolved(job)
    monkeypatch.setenv("DSFT_CHAT_TEMPLATE", "{{ messages }}")
    known = resolved(job)
    assert known.template_digest is not None
    assert resolved(job, known) == known
    monkeypatch.setenv("DSFT_CHAT_TEMPLATE", "{{ messages[0] }}")
    with pytest.raises(TrainerError, match="the chat template of the ConfigMap is not what the run began with"):
        pinned(job, known)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("place", ["file", "s3"])
def test_another_template_is_refused_by_both_digests(
    hub: dict[str, str], tmp_path: Path, s3_uri: str, place: str, file: str
) -> None:
    hub |= {"datasets/org/chats": "2" * 40}
    uri = s3_uri if place == "s3" else tmp_path.as_uri()
    store, job = open_store(uri), chats(uri)
    store.put_bytes(file, b"{}")
    store.put_bytes("model.safetensors", b"1")
    known = resolved(job)
    assert known.template_digest is not None
    # Weights and vocabulary are none of the template's.
    store.put_bytes("model.safetensors", b"2")
    store.put_bytes("tokenizer.json", b"{}")
    assert resolved(job, known) == known
    store.put_bytes(file, b"{ }")
    with pytest.raises(TrainerError) as caught:
        pinned(job, known)
    assert caught.value.failure_class is FailureClass.DATA_INVALID
    assert f"the chat template of {uri} is not what the run began with" in caught.value.message
    assert known.template_digest in caught.value.message
    older = known.model_copy(update={"template_digest": None})
    assert resolved(job, older).template_digest != known.template_digest


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
