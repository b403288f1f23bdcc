"""The push to the Hub, by huggingface_hub, against a double of the Hub's API (`hub_server`)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from dsft_api.conditions import FailureClass
from dsft_api.spec.policy import PushToHub
from dsft_trainer.errors import TrainerError
from dsft_trainer.hub import push
from tests.trainer.hub_server import HubServer

TOKEN = "hf_" + "t" * 8
SPEC = PushToHub(repo_id="org/chat")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The double, and huggingface_hub led to it."""
    with HubServer(TOKEN) as server:
        # Read from the environment when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.uri)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setattr(hf_api.api, "endpoint", server.uri)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# chat\n")
    return folder


def test_all_files_are_pushed_in_one_commit_and_doing_it_again_changes_nothing(hub: HubServer, export: Path) -> None:
    pushed = push(SPEC, export, "chat: step 4")
    repository = hub.repositories["org/chat"]
    assert repository.private
    assert {name: repository.files[name] for name in ("model.safetensors", "config.json", "README.md")} == {
        path.name: path.read_bytes() for path in export.iterdir()
    }
    assert pushed == f"org/chat@{repository.commits[-1]}"
    commits, sent = list(repository.commits), hub.sent
    assert push(SPEC, export, "chat: step 4") == pushed
    assert (repository.commits, hub.sent) == (commits, sent)


def test_a_push_that_failed_half_way_is_completed(hub: HubServer, export: Path) -> None:
    push(SPEC, export, "first")
    (export / "config.json").write_text('{"changed": true}')
    pushed = push(SPEC, export, "second")
    assert hub.repositories["org/chat"].files["config.json"] == b'{"changed": true}'
    assert pushed.startswith("org/chat@")


def test_weights_of_another_push_go_and_other_files_stay(hub: HubServer, export: Path) -> None:
    """A loader would take an adapter that lies beside a merged model, and one file before several."""
    (export / "adapter_config.json").write_text("{}")
    (export / "adapter_model.safetensors").write_bytes(b"adapter")
    push(SPEC, export, "adapters")
    repository = hub.repositories["org/chat"]
    repository.files |= {"notes.md": b"by hand", "vision/other.safetensors": b"by hand"}
    for path in export.glob("*adapter*"):
        path.unlink()
    (export / "model.safetensors").rename(export / "model-00001-of-00001.safetensors")
    push(SPEC, export, "merged")
    assert repository.files.keys() >= {
        "notes.md",
        "vision/other.safetensors",
        "model-00001-of-00001.safetensors",
        "config.json",
        "README.md",
    }
    assert not {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} & repository.files.keys()


@pytest.mark.parametrize("status", [401, 403])
def test_a_push_that_is_denied_ends_the_run_and_says_that_the_export_is_kept(
    hub: HubServer, export: Path, status: int
) -> None:
    hub.status = status
    with pytest.raises(TrainerError) as raised:
        push(SPEC, export, "chat")
    assert raised.value.failure_class is FailureClass.MODEL_DENIED
    assert "org/chat was not pushed; the export is in storage" in raised.value.message
    assert "HF_TOKEN" in raised.value.remedy
    assert TOKEN not in str(raised.value)


def test_a_model_card_that_the_hub_does_not_take_is_no_reason_to_try_again(hub: HubServer, export: Path) -> None:
    (export / "README.md").write_text("---\nbase_model: file:///models/mine\n---\n")
    with pytest.raises(TrainerError, match="Invalid metadata") as raised:
        push(SPEC, export, "chat")
    assert raised.value.failure_class is FailureClass.MODEL_DENIED


def test_a_hub_that_cannot_be_reached_is_tried_again_by_the_next_attempt(
    hub: HubServer, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrainerError) as raised:
        push(SPEC, export, "chat")
    assert raised.value.failure_class is FailureClass.UNKNOWN
    assert raised.value.failure_class.failure.retried
