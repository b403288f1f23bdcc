"""The starts of the ranks inside one attempt on Ray: one after the other, and what status says while they are silent.

Each is a trainer of its own: all that the first start does, and all that is found out about its end, serves the next ones
too (docs/decisions/0016).
"""

import hashlib
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray

from dsft_api.job import Job
from dsft_api.progress import Progress
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.checkpoint.ray_book import BOOK, found_at_start
from dsft_trainer.checkpoint.store import store_of
from dsft_trainer.errors import TrainerError
from dsft_trainer.progress import starting
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.runtime.starts import HEALED, Start, waiting

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


def run_starts(job: Job, channel: Channel, relay: Any, fit: Callable[[Start], None]) -> None:
    """Have `fit` start the ranks and see them end, and again after each loss that is healed so.

    Raises:
        TrainerError: the failure that ended the attempt.
    """
    opening = _opening(job)  # which may mend what `_newest` reads
    start = Start(1, _newest(job), opening)
    while True:
        channel.forget_failures()
        ray.get(relay.begin.remote(start.number), timeout=30)
        try:
            fit(start)
        except TrainerError as failure:
            following = _following(job, start, failure, channel)
            if following is None:
                raise
            log.warning("start %d of the ranks was lost: %s", start.number, failure)
            start = following
        else:
            return


def _following(job: Job, start: Start, failure: TrainerError, channel: Channel) -> Start | None:
    # Imported here, as it takes Ray Train with it: the driver imports that beside `ray.init`.
    from dsft_trainer.runtime import ray_failures

    # A controller that died may have left its placement group, which goes with the driver.
    is_beyond = ray_failures.never_placed(failure.__cause__) or ray_failures.controller_died(failure.__cause__)
    if failure.failure_class not in HEALED or is_beyond:
        return None
    try:
        newest = _newest(job)
    except (TrainerError, OSError) as error:
        log.warning("storage does not say what was committed, so the ranks are not started again: %s", error)
        return None
    told = channel.progress() or start.opening
    return start.after(failure, told, newest, datetime.now(UTC), draining=channel.drain_requested())


def _opening(job: Job) -> Progress:
    """The document of an attempt's first start. The ranks of the built-in training say themselves where they begin."""
    opening = starting(job)
    checkpoints = found_at_start(job, store_of(job)) if job.spec.program is not None else None
    if checkpoints is None or checkpoints.latest is None:
        return opening
    return opening.model_copy(update={"checkpoints": checkpoints, "from_step": checkpoints.latest.step})


def _newest(job: Job) -> str | None:
    """What names the newest commit: its folder, or of a program, whose commits are Ray Train's, the digest of its book."""
    if job.spec.program is None:
        commits = read_commits(store_of(job))
        return commits[-1].name if commits else None
    book = store_of(job).get_bytes(BOOK)
    return hashlib.sha256(book).hexdigest() if book is not None else None


class Silence:
    """Until the ranks of a start are heard: tells status what they wait for."""

    def __init__(self, job: Job, start: Start, relay: Any) -> None:
        self._ranks = job.ranks
        self._start = start
        self._relay = relay
        self._told: str | None = None
        self._next_look: float | None = 0.0

    def look(self) -> None:
        """Cheap: looks once a second, and no more once they were heard."""
        if self._next_look is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        message = waiting(self._start, self._lacking())
        news = None
        if message != self._told:
            changes = {"message": message[:1024], "updated_at": datetime.now(UTC)}
            news = self._start.opening.model_copy(update=changes).model_dump_json(by_alias=True)
        try:
            if not ray.get(self._relay.announce.remote(self._start.number, news), timeout=10):
                self._next_look = None
            self._told = message
        except ray.exceptions.RayError as error:
            log.warning("the relay does not answer: %s", error)

    def _lacking(self) -> str | None:
        kind = "GPU" if self._ranks.device == "cuda" else "CPU"
        missing = self._ranks.count - int(ray.cluster_resources().get(kind, 0))
        return f"waiting for nodes: {missing} of {self._ranks.count} {kind}s are missing" if missing > 0 else None


class Notices:
    """Ray's word that a node is about to go (a spot node's last minutes, an autoscaler's drain): the run commits and stops.

    As where a pod is deleted, whose preStop hook asks for the same. Nodes that were leaving before have no ranks of this start.
    """

    def __init__(self, relay: Any) -> None:
        self._relay = relay
        self._leaving: frozenset[str] | None = None
        self._next_look = 0.0

    def look(self) -> None:
        """Cheap: looks once a second."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        try:
            # What Ray Train's own watcher asks; there is no public way.
            leaving = frozenset(ray._private.state.state.get_draining_nodes())
            new = leaving - self._leaving if self._leaving is not None else frozenset[str]()
            # A program that does not look is better left alone: what it loses, it starts again after.
            if new and ray.get(self._relay.drains.remote(), timeout=10):
                log.warning("Ray is about to lose node %s: the ranks shall commit and stop", ", ".join(sorted(new)))
                ray.get(self._relay.request_drain.remote(), timeout=10)
        except ray.exceptions.RayError as error:
            log.warning("which nodes are leaving is not known: %s", error)
        else:
            self._leaving = leaving
