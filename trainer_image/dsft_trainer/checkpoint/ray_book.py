"""The checkpoints of a program. Ray Train's book says which there are and where to resume; a ledger beside it adds the rest.

The book is rewritten in place at each checkpoint, so on a file system a kill can leave half of one. The ledger, which is replaced
as a whole, keeps the last good one, and each attempt begins by mending (docs/decisions/0022). No Ray here.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import Field, ValidationError

from dsft_api.base import ApiModel
from dsft_api.job import Job
from dsft_api.spec.identity import EvaluationSpec
from dsft_api.status import MAX_RETAINED, CheckpointRef, Checkpoints
from dsft_trainer.checkpoint.store import Store

log = logging.getLogger(__name__)

FOLDER = "ray"
"""Ray Train's folder in the run's own."""
BOOK = f"{FOLDER}/checkpoint_manager_snapshot.json"
"""Where Ray Train writes down which checkpoints there are."""
LEDGER = f"{FOLDER}/dsft-ledger.json"

_PROGRESS = ("step", "total_steps", "epoch")
_MAX_METRICS = 32


class Ledger(ApiModel):
    """What is known of the checkpoints in the book."""

    book: str = Field(description="The book, as Ray Train wrote it.")
    checkpoints: tuple[CheckpointRef, ...] = Field(description="Those in it, oldest first.")


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the book: the name of its folder, and the metrics that rank 0 reported with it."""

    name: str
    metrics: Mapping[str, Any]


def entries(book: bytes) -> tuple[Entry, ...] | None:
    """What a book lists, oldest first; None if it is no whole book. Pure."""
    try:
        results = json.loads(book)["checkpoint_results"]
        return tuple(Entry(result["checkpoint_dir_name"], result["metrics"]) for result in results)
    except (ValueError, KeyError, TypeError):
        return None


def read_ledger(store: Store) -> Ledger | None:
    """The ledger; None if there is none that can be read."""
    text = store.get_bytes(LEDGER)
    if text is None:
        return None
    try:
        return Ledger.model_validate_json(text)
    except ValidationError as error:
        log.warning("%s/%s is no ledger and is left out: %s", store.uri, LEDGER, error)
        return None


def mend(store: Store) -> Ledger | None:
    """Put the last good book in the place of one that was torn; the ledger, if there is one. Call it while no ranks run."""
    ledger = read_ledger(store)
    book = store.get_bytes(BOOK)
    if book is None or entries(book) is not None:
        return ledger
    log.warning("%s/%s was cut off in the middle of a write: going back to the checkpoint before it", store.uri, BOOK)
    if ledger is not None:
        store.put_bytes(BOOK, ledger.book.encode())
    else:
        store.delete([BOOK])
    return ledger


def listed(
    store: Store, known: Sequence[CheckpointRef], *, evaluation: EvaluationSpec, step: int, world_size: int
) -> Checkpoints | None:
    """The checkpoints in the book; None if there are none. Those that are not `known` yet are looked at, and the ledger written.

    `step` and `world_size` are what a new one gets that does not say its step.
    """
    book = store.get_bytes(BOOK)
    found = entries(book) if book is not None else None
    if book is None or not found:
        return None
    by_uri = {ref.uri: ref for ref in known}
    refs = []
    for entry in found:
        folder = f"{FOLDER}/{entry.name}"
        uri = f"{store.uri}/{folder}"
        if uri not in by_uri:
            size = sum(file.size for file in store.list(folder))
            by_uri[uri] = _ref(uri, entry.metrics, size, step=step, world_size=world_size)
        refs.append(by_uri[uri])
    if tuple(refs) != tuple(known):
        ledger = Ledger(book=book.decode(), checkpoints=tuple(refs))
        store.put_bytes(LEDGER, ledger.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())
    return Checkpoints(latest=refs[-1], best=_best(refs, evaluation), retained=tuple(refs[-MAX_RETAINED:]))


def found_at_start(job: Job, store: Store) -> Checkpoints | None:
    """What an attempt begins with: the book mended, and what it lists."""
    ledger = mend(store)
    known = ledger.checkpoints if ledger is not None else ()
    step = known[-1].step if known else 0
    return listed(store, known, evaluation=job.spec.evaluation, step=step, world_size=job.ranks.count)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in what a program reported."""
    return {name: number for name, value in metrics.items() if (number := _finite(value)) is not None}


def metrics_of(named: Mapping[str, float]) -> dict[str, float]:
    """As many as status has room for, by names that it takes."""
    return {name[:64]: value for name, value in list(named.items())[:_MAX_METRICS]}


def _ref(uri: str, metrics: Mapping[str, Any], size: int, *, step: int, world_size: int) -> CheckpointRef:
    found = numbers(metrics)
    return CheckpointRef(
        uri=uri,
        step=int(found.get("step", step)),
        epoch=found.get("epoch", 0.0),
        world_size=world_size,
        bytes=size,
        time=datetime.now(UTC).replace(microsecond=0),
        metrics=metrics_of({name: value for name, value in found.items() if name not in _PROGRESS}),
    )


def _best(refs: Sequence[CheckpointRef], evaluation: EvaluationSpec) -> CheckpointRef | None:
    metric, sign = evaluation.metric, -1.0 if evaluation.larger_is_better else 1.0
    scored = [ref for ref in refs if metric in ref.metrics]
    return min(scored, key=lambda ref: sign * ref.metrics[metric], default=None)


def _finite(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]  whatever a user reports
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, str) else None
