"""Uploads the exported model to the Hugging Face Hub, as one commit. The export in storage is there before, and stays.

Doing it again is harmless: files that the repository has are not sent, and where all are there no commit is made. The token comes
from HF_TOKEN, as for downloads.
"""

import json
import logging
from pathlib import Path

from dsft_api.conditions import FailureClass
from dsft_api.spec.policy import PushToHub
from dsft_trainer.data.sources import may_pass
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

# What loaders would prefer to, or put beside, what is pushed.
WEIGHTS = ["model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors", "adapter_config.json"]
_KEPT = "the export is in storage"


def push(spec: PushToHub, folder: Path, message: str) -> str:
    """Make the repository if there is none, and commit all files of `folder`; `ORG/NAME@COMMIT`.

    Weights and adapters that were there go, other files stay. A repository that is there stays public or private as it is.

    Raises:
        TrainerError: ModelDenied if the Hub does not let us; Unknown, which is tried again, if it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(spec.repo_id, private=spec.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=spec.repo_id, folder_path=folder, commit_message=message, delete_patterns=WEIGHTS
        )
    except errors.HfHubHTTPError as error:
        raise _failure(spec, error, denied=not may_pass(error)) from error
    except (errors.HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise _failure(spec, error, denied=False) from error
    except ValueError as error:
        # A name or a model card that the Hub does not take.
        raise _failure(spec, error, denied=True) from error
    log.info("pushed the model to %s", commit.commit_url)
    return f"{spec.repo_id}@{commit.oid}"


def _failure(spec: PushToHub, error: Exception, *, denied: bool) -> TrainerError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    message = f"spec.export.pushToHub: {spec.repo_id} was not pushed; {_KEPT}: {said}"
    if denied:
        remedy = (
            "let HF_TOKEN (spec.env, by secretKeyRef) be a token that may write there, or correct repoId or remove "
            "pushToHub; then set a new spec.retry.token: only the export is done again"
        )
        return TrainerError(FailureClass.MODEL_DENIED, message, remedy)
    return TrainerError(FailureClass.UNKNOWN, message, "check the network, proxy and HF_ENDPOINT; it is tried again")
