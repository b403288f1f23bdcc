"""The checkpoint of another run that a run starts from (`spec.startFrom`): found once, and held to by its digest.

The other run is looked for beside this one: below the same `spec.storage.uri`, in the same namespace. That is as far as
the trust goes that is put in this run's own folder, and needs neither Kubernetes nor the other resource, which may be gone.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from dsft_api.conditions import FailureClass
from dsft_api.layout import CHECKPOINTS, RUN_FILE
from dsft_api.spec.identity import EvaluationSpec, StartFrom
from dsft_trainer.checkpoint.commits import COMMIT_FILE, Commit, best
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError

Open = Callable[[str], Store]
"""Opens the store at a URI, with the run's settings."""


@dataclass(frozen=True)
class Pin:
    """A checkpoint by its place and the digest of its COMMIT.json."""

    uri: str
    digest: str


@dataclass(frozen=True)
class Origin:
    """A verified commit of another run."""

    uri: str
    store: Store
    commit: Commit
    weights_only: bool


def choose(start: StartFrom, prefix: str, evaluation: EvaluationSpec, open_: Open) -> Pin:
    """The checkpoint that `spec.startFrom` means now, for the run whose folder is `prefix`.

    Raises:
        TrainerError: ConfigInvalid, naming what there is, if there is no such run or checkpoint.
    """
    namespace, _, own = prefix.rpartition("/")
    found = [
        name for name in open_(namespace).folders() if re.fullmatch(rf"{re.escape(start.run)}-[0-9a-f]{{8}}", name)
    ]
    runs = {name: open_(f"{namespace}/{name}") for name in found if name != own}
    if not runs:
        raise _refused(
            "run", f"there is no run {start.run} in {namespace}", "name a run with the same spec.storage.uri"
        )
    # A name may have been used again.
    store = max(runs.values(), key=_created)
    commits = read_commits(store)
    match start.checkpoint:
        case "latest":
            named = commits[-1:]
        case "best":
            named = best(commits, evaluation.metric, evaluation.larger_is_better)[:1]
        case name:
            named = [commit for commit in commits if commit.name == name]
    if not named:
        there = ", ".join(commit.name for commit in commits) or "none"
        raise _refused("checkpoint", f"{store.uri} has no checkpoint {start.checkpoint}", f"it has: {there}")
    text = store.get_bytes(named[0].key) or b""
    return Pin(f"{store.uri}/{named[0].folder}", _digest(text))


def open_origin(pin: Pin, *, weights_only: bool, open_: Open) -> Origin:
    """The pinned checkpoint, if it is still what it was.

    Raises:
        TrainerError: ConfigInvalid if it is gone or has changed.
    """
    run, _, name = pin.uri.rpartition(f"/{CHECKPOINTS}/")
    store = open_(run)
    text = store.get_bytes(f"{CHECKPOINTS}/{name}/{COMMIT_FILE}")
    if text is None:
        raise _refused("checkpoint", f"{pin.uri} is gone", "make a new run, which starts from what there is now")
    if _digest(text) != pin.digest:
        raise _refused("checkpoint", f"{pin.uri} is not {pin.digest} any more", "put it back, or make a new run")
    return Origin(pin.uri, store, Commit.model_validate_json(text), weights_only)


def _refused(field: str, message: str, remedy: str) -> TrainerError:
    return TrainerError(FailureClass.CONFIG_INVALID, f"spec.startFrom.{field}: {message}", remedy)


def _digest(text: bytes) -> str:
    return f"sha256:{hashlib.sha256(text).hexdigest()}"


def _created(store: Store) -> str:
    return str(json.loads(store.get_bytes(RUN_FILE) or b"{}").get("createdAt", ""))
