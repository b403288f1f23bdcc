"""Saves, restores and retires checkpoints: DeepSpeed's shards plus RNG, committed by one manifest written last.

A save begins at a step boundary: every rank copies its state into host memory. The rest is done by a thread of each rank while
the loop goes on: it writes and uploads the files, then `rank-<r>.json`; once all ranks have, rank 0's thread reads those
manifests, checks that no newer group start has claimed the run, and writes COMMIT.json. A kill at any point leaves either a
whole checkpoint or a folder without COMMIT.json, which nobody reads and the next start sweeps.

The threads have a process group of their own, with one collective per save: they cannot mix with those of the loop. How a save
ended the loop learns in `settle`, where rank 0's word counts for all ranks, so that all of them go on with the same commits.

What a start goes on from is the work of `restore`.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from dsft_api.conditions import FailureClass
from dsft_api.layout import CHECKPOINTS
from dsft_api.status import Checkpoints
from dsft_trainer import collectives
from dsft_trainer.checkpoint import files, universal
from dsft_trainer.checkpoint.background import Task
from dsft_trainer.checkpoint.backoff import patiently
from dsft_trainer.checkpoint.commits import (
    COMMIT_FILE,
    ClaimId,
    Commit,
    CommittedFile,
    Patience,
    commit_name,
    parse_name,
    superfluous,
)
from dsft_trainer.checkpoint.listing import Retention, claimed_ids, make_claim, manifest, references, taken_over
from dsft_trainer.checkpoint.restore import Loading, Restorer
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Place

log = logging.getLogger(__name__)
MAX_DAMAGED = 5
_FILES = TypeAdapter(tuple[CommittedFile, ...])


class Staged(Protocol):
    """This rank's part of a checkpoint, in memory and independent of the engine."""

    def write(self, folder: Path) -> None:
        """Write its files below `folder`. May be called again, should the upload fail."""
        ...


class Shards(Loading, Protocol):
    """What is saved: the engine's state of this rank. All calls are collective."""

    def stage(self, folder: Path, tag: str) -> Staged:
        """Copy the state into memory; what was staged before is no longer needed. `folder` is for what cannot be."""
        ...


@dataclass(frozen=True)
class Point:
    """Where in the training a checkpoint is."""

    step: int
    samples: int
    epoch: float
    metrics: Mapping[str, float]
    patience: Patience | None = None


@dataclass(frozen=True)
class Identity:
    """What every commit of a run has in common."""

    spec_hash: str
    zero_stage: int
    precision: str
    versions: Mapping[str, str]


class Checkpointer:
    """One group start's view of the run's checkpoints. All methods are collective; `saving` is this rank's own.

    One save at a time: `start` it, and `settle` it before the next. `before_commit` runs on rank 0's thread between the
    uploads and the commit.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        scratch: Path,
        identity: Identity,
        retention: Retention,
        restorer: Restorer | None = None,
    ) -> None:
        self.before_commit: Callable[[], None] = lambda: None
        self.store = store
        self.place = place
        self.scratch = scratch
        self.identity = identity
        self.retention = retention
        self.commits: list[Commit] = []
        self.restorer = restorer or Restorer(store, place, scratch)
        self._claim: ClaimId | None = None
        self._group = collectives.side_group()
        self._task: Task[Commit | None] | None = None
        self._doomed: set[str] = set()

    @property
    def claim(self) -> ClaimId:
        """This group start. Known after `begin`."""
        if self._claim is None:
            raise RuntimeError("begin() has not been called")
        return self._claim

    def begin(self, attempt: int) -> Commit | None:
        """Find what to go on from (see `Restorer.find`), and claim a group start based on it.

        Returns the commit to `load`, or None to start from the beginning.

        Raises:
            TrainerError: HeadLost if an attempt after this one has claimed the run; what `Restorer.find` raises.
        """
        restorer = self.restorer
        restorer.find()
        self.commits = restorer.commits
        self._doomed = set(restorer.damaged)
        own, origin = (self.commits[-1] if self.commits else None), (restorer.origin.uri if restorer.origin else None)
        self._claim = collectives.on_first(
            self.place.is_first,
            lambda: make_claim(
                self.store, attempt, own, self.place.world_size, origin=origin, origin_step=restorer.first_step
            ),
        )
        # Ranks that are started again by an attempt that was frozen: a newer one has the run.
        collectives.on_first(self.place.is_first, self.check_claim)
        collectives.on_first(self.place.is_first, self._sweep)
        return restorer.base

    def convert(self) -> None:
        """Convert what was found, if it must be, into a folder of this claim."""
        self.restorer.convert(self.claim)

    def load(self, shards: Shards) -> None:
        """Load what was found, if anything."""
        self.restorer.load(shards)

    @property
    def pending(self) -> bool:
        """Whether a save was started and not settled yet; the same on all ranks."""
        return self._task is not None

    @property
    def saving(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._task is not None and self._task.running

    def start(self, shards: Shards, point: Point) -> None:
        """Copy the state; it is uploaded, verified and committed in the background from here on."""
        if self.pending:
            raise RuntimeError("the save before this one is not settled")
        name = commit_name(point.step, self.claim)
        staged = shards.stage(self._save_folder / "staging", name)
        draft = Commit(
            name=name,
            claim=self.claim,
            step=point.step,
            samples=point.samples,
            epoch=point.epoch,
            world_size=self.place.world_size,
            zero_stage=self.identity.zero_stage,
            precision=self.identity.precision,
            spec_hash=self.identity.spec_hash,
            versions=dict(self.identity.versions),
            metrics=dict(point.metrics),
            patience=point.patience,
            files=(),
            time=datetime.now(UTC),
        )
        self._task = Task(lambda: self._save(staged, draft), name=name)

    def settle(self) -> Commit | TrainerError:
        """Wait for the save's end; its commit, or why there is none, on all ranks.

        HeadLost means that a newer group start has claimed the run: this one is a zombie and must stop.
        """
        if self._task is None:
            raise RuntimeError("no save was started")
        task, self._task = self._task, None
        outcome = collectives.broadcast(task.outcome())
        if isinstance(outcome, Commit):
            self.commits = self._kept(outcome)
        else:
            self._doomed.add(task.name)
        return outcome or TrainerError(FailureClass.UNKNOWN, "the save ended without a word")

    def check_claim(self) -> None:
        """See that this start still has the run. Not collective.

        Raises:
            TrainerError: HeadLost if another one has taken it over; Unknown if the claim is gone.
        """
        claims = claimed_ids(self.store)
        newest = max(claims, default=self.claim)
        if newest > self.claim:
            raise taken_over(self.claim, newest)
        if self.claim not in claims:
            raise TrainerError(
                FailureClass.UNKNOWN,
                f"the claim {self.claim} of this start is gone from {self.store.uri}: somebody removed the run's folder, "
                "or parts of it, while it trained",
                "leave the folder alone while the run is there; the next attempt goes on with what is left in it",
            )

    def close(self, seconds: float) -> None:
        """Give a save that is on its way so long to end. Not collective: for the end of a rank, however it ends."""
        if self._task is not None and not self._task.wait(seconds):
            log.warning("a checkpoint was not committed within %.0f s", seconds)

    @property
    def _save_folder(self) -> Path:
        return self.scratch / "save" / f"rank-{self.place.rank}"

    def _save(self, staged: Staged, draft: Commit) -> Commit | None:
        """All of a save but the copy, on this rank's thread; the commit on rank 0."""
        collectives.together(lambda: patiently(lambda: self._upload(staged, draft.name)), self._group)
        if not self.place.is_first:
            return None
        patiently(self.before_commit)
        draft = draft.model_copy(update={"time": datetime.now(UTC)})
        commit = patiently(lambda: self._commit(draft))
        kept = {commit.name for commit in self._kept(commit)}
        self._doomed = (self._doomed | {commit.name for commit in self.commits}) - kept
        # Frozen while COMMIT.json was on its way, this start may have been superseded from an older commit: then it must not
        # decide what others need. One that claims from here on goes on from this commit, and lets the same ones go.
        try:
            patiently(self.check_claim)
        except TrainerError as error:
            if error.failure_class is FailureClass.HEAD_LOST:
                raise
            log.warning("nothing is retired for now, since the claims cannot be read: %s", error)
        else:
            self._retire()
        return commit

    def _upload(self, staged: Staged, name: str) -> None:
        """Write this rank's files and move them to the store, from the beginning: a store may take a file away."""
        folder = self._save_folder / name
        try:
            staged.write(folder)
            sent = files.upload(self.store, folder, f"{CHECKPOINTS}/{name}", self.place.rank)
        finally:
            shutil.rmtree(self._save_folder, ignore_errors=True)
        self.store.put_bytes(f"{CHECKPOINTS}/{name}/rank-{self.place.rank}.json", _FILES.dump_json(sent))

    def _commit(self, draft: Commit) -> Commit:
        manifests = [
            self.store.get_bytes(f"{CHECKPOINTS}/{draft.name}/rank-{rank}.json") or b"[]"
            for rank in range(draft.world_size)
        ]
        sent = tuple(file for text in manifests for file in _FILES.validate_json(text))
        short = files.missing(self.store, draft.folder, sent)
        if short or {file.rank for file in sent} != set(range(draft.world_size)):
            raise TrainerError(
                FailureClass.UNKNOWN, f"checkpoint {draft.name} did not arrive whole in {self.store.uri}: {short}"
            )
        self.check_claim()
        commit = draft.model_copy(update={"files": sent})
        self.store.put_bytes(commit.key, manifest(commit))
        return commit

    def references(self, prefix: str) -> Checkpoints:
        """The commits, and what was passed over on the way to them, as status shows them."""
        damaged = tuple(self.restorer.damaged[-MAX_DAMAGED:])
        return references(prefix, self.commits, self.retention).model_copy(update={"damaged": damaged})

    def _kept(self, commit: Commit) -> list[Commit]:
        """The commits that there are with this one."""
        commits = [*self.commits, commit]
        gone = superfluous(
            commits,
            keep_last=self.retention.keep_last,
            keep_best=self.retention.keep_best,
            metric=self.retention.metric,
            larger_is_better=self.retention.larger_is_better,
        )
        return [commit for commit in commits if commit not in gone]

    def _retire(self) -> None:
        """Delete what the policy let go; what cannot be deleted now is tried again after the next save."""
        try:
            self._delete_folders(self._doomed)
            self._doomed = set()
            if self.restorer.conversion is not None:
                universal.sweep(self.store, self.claim)
                self.restorer.conversion = None
        except TrainerError as error:
            log.warning("old checkpoints could not be deleted, for now: %s", error)

    def _sweep(self) -> None:
        """Remove what crashes, superseded groups and an interrupted retirement left behind."""
        # What did not match its checksums here may be whole in storage: it stays until there is a commit of this start.
        kept = {*(commit.name for commit in self.commits), *self.restorer.damaged}
        present = {entry.key.split("/")[1] for entry in self.store.list(f"{CHECKPOINTS}/")}
        # A start that froze between its claim and here must not touch what its successors wrote.
        later = {name for name in present if (parsed := parse_name(name)) and parsed[1] > self.claim}
        doomed = present - kept - later
        if doomed:
            log.info("sweeping checkpoints that do not count: %s", ", ".join(sorted(doomed)))
            self._delete_folders(doomed)
        universal.sweep(self.store, self.claim, kept=self.restorer.conversion)

    def _delete_folders(self, names: set[str]) -> None:
        for name in sorted(names):
            keys = [entry.key for entry in self.store.list(f"{CHECKPOINTS}/{name}/")]
            # COMMIT.json goes first: what is half deleted must not count.
            self.store.delete(sorted(keys, key=lambda key: not key.endswith(COMMIT_FILE)))
