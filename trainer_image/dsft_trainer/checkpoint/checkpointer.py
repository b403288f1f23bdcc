"""Saves, restores and retires checkpoints: DeepSpeed's shards plus RNG, committed by one manifest written last.

A save begins at a step boundary: every rank copies its state into host memory. The rest is done by a thread of each rank while
the loop goes on: it writes and uploads the files, then `rank-<r>.json`; once all ranks have, rank 0's thread reads those
manifests, checks that no newer group start has claimed the run, and writes COMMIT.json. A kill at any point leaves either a
whole checkpoint or a folder without COMMIT.json, which nobody reads and the next start sweeps.

The threads have a process group of their own, with one collective per save: they cannot mix with those of the loop. How a save
ended the loop learns in `settle`, where rank 0's word counts for all ranks, so that all of them go on with the same commits.

A commit of another number of ranks is converted at the start, once, by rank 0 (see `universal`).
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
from dsft_trainer import collectives
from dsft_trainer.checkpoint import files, universal
from dsft_trainer.checkpoint.background import Task
from dsft_trainer.checkpoint.backoff import patiently
from dsft_trainer.checkpoint.commits import (
    COMMIT_FILE,
    ClaimId,
    Commit,
    CommittedFile,
    commit_name,
    parse_name,
    superfluous,
)
from dsft_trainer.checkpoint.listing import Retention, make_claim, manifest, read_claims, read_commits
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime import Place

log = logging.getLogger(__name__)
_FILES = TypeAdapter(tuple[CommittedFile, ...])
Convert = Callable[[Path, Path], None]


class Staged(Protocol):
    """This rank's part of a checkpoint, in memory and independent of the engine."""

    def write(self, folder: Path) -> None:
        """Write its files below `folder`. May be called again, should the upload fail."""
        ...


class Shards(Protocol):
    """What is saved: the engine's state of this rank. All calls are collective."""

    def stage(self, folder: Path, tag: str) -> Staged:
        """Copy the state into memory; what was staged before is no longer needed. `folder` is for what cannot be."""
        ...

    def load(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`, which holds this rank's files."""
        ...

    def load_universal(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`, a converted checkpoint that all ranks of this node read."""
        ...


@dataclass(frozen=True)
class Point:
    """Where in the training a checkpoint is."""

    step: int
    samples: int
    epoch: float
    metrics: Mapping[str, float]


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
    uploads and the commit. `convert` makes a universal checkpoint (its second path) of the whole one in its first; without
    it, a commit of another number of ranks is refused.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        scratch: Path,
        identity: Identity,
        retention: Retention,
        convert: Convert | None = universal.convert,
    ) -> None:
        self.before_commit: Callable[[], None] = lambda: None
        self.store = store
        self.place = place
        self.scratch = scratch
        self.identity = identity
        self.retention = retention
        self.commits: list[Commit] = []
        self.base: Commit | None = None
        self._convert = convert
        self._conversion: universal.Conversion | None = None
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
        """Find the newest whole commit, fetch what this rank needs of it, and claim a group start based on it.

        Returns the commit to `load`, or None to start from the beginning. A commit whose files do not match their
        checksums is passed over for the one before it.

        Raises:
            TrainerError: ConfigInvalid if the commit was written by another number of ranks, and may not be converted.
        """
        commits = collectives.on_first(self.place.is_first, lambda: read_commits(self.store))
        while commits:
            candidate = commits[-1]
            if self._fetched_everywhere(candidate):
                break
            log.warning("checkpoint %s does not match its checksums: falling back to the one before it", candidate.name)
            commits = commits[:-1]
        self.commits = commits
        self.base = commits[-1] if commits else None
        self._claim = collectives.on_first(
            self.place.is_first, lambda: make_claim(self.store, attempt, self.base, self.place.world_size)
        )
        collectives.on_first(self.place.is_first, self._sweep)
        return self.base

    @property
    def resized(self) -> bool:
        """Whether the base was written by another number of ranks; it must be converted before it is loaded."""
        return self.base is not None and self.base.world_size != self.place.world_size

    def convert(self) -> None:
        """Convert a base of another number of ranks, unless a start before this one has, and fetch the result.

        Raises:
            TrainerError: whatever kept rank 0 from it.
        """
        base, convert = self.base, self._convert
        if base is None or convert is None or not self.resized or self._conversion is not None:
            return
        self._conversion = collectives.on_first(self.place.is_first, lambda: self._converted(base, convert))
        if not self._conversion_fetched(self._conversion):
            raise TrainerError(FailureClass.UNKNOWN, f"the conversion of {base.name} did not arrive whole on all nodes")

    def load(self, shards: Shards) -> None:
        """Load the files that `begin` and `convert` fetched."""
        if self.base is None:
            return
        if not self.resized:
            shards.load(self._restore_folder, self.base.name)
            shutil.rmtree(self._restore_folder, ignore_errors=True)
            return
        shards.load_universal(self._universal_folder, self.base.name)
        # All ranks of a node read the same files.
        collectives.barrier()
        shutil.rmtree(self._universal_folder, ignore_errors=True)

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

    def close(self, seconds: float) -> None:
        """Give a save that is on its way so long to end. Not collective: for the end of a rank, however it ends."""
        if self._task is not None and not self._task.wait(seconds):
            log.warning("a checkpoint was not committed within %.0f s", seconds)

    @property
    def _restore_folder(self) -> Path:
        return self.scratch / "restore" / f"rank-{self.place.rank}"

    @property
    def _save_folder(self) -> Path:
        return self.scratch / "save" / f"rank-{self.place.rank}"

    @property
    def _universal_folder(self) -> Path:
        """Shared by the ranks of a node."""
        return self.scratch / "restore" / "universal"

    def _fetched_everywhere(self, commit: Commit) -> bool:
        """Whether all ranks have what they need of a commit; False if a file is missing or differs."""
        if commit.world_size == self.place.world_size:
            return all(collectives.gather(collectives.together(lambda: self._fetch(commit, {self.place.rank}))))
        self._refuse_unless_convertible(commit)
        found = collectives.on_first(self.place.is_first, lambda: universal.find(self.store, commit))
        if found is not None and self._conversion_fetched(found):
            self._conversion = found
            return True
        return collectives.on_first(self.place.is_first, lambda: self._fetch(commit, set(range(commit.world_size))))

    def _refuse_unless_convertible(self, commit: Commit) -> None:
        if self._convert is None:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"spec.checkpoint.onWorldSizeChange is refuse: checkpoint {commit.name} was written by "
                f"{commit.world_size} ranks, and {self.place.world_size} would load it",
                f"write convert there, run with {commit.world_size} ranks again (spec.nodePools, or --workers), "
                "or start again with --fresh",
            )

    def _fetch(self, commit: Commit, ranks: set[int]) -> bool:
        wanted = [file for file in commit.files if file.rank in ranks]
        return files.fetch(self.store, commit.folder, wanted, self._restore_folder / commit.name)

    def _conversion_fetched(self, conversion: universal.Conversion) -> bool:
        """Whether all nodes have a conversion, each by its first rank."""
        folder = self._universal_folder / conversion.source

        def fetch() -> bool:
            return not self.place.is_first_on_node or conversion.fetch(self.store, folder)

        return all(collectives.gather(collectives.together(fetch)))

    def _converted(self, base: Commit, convert: Convert) -> universal.Conversion:
        """Convert the base, whose files are here, and commit the result; on rank 0."""
        source, target = self._restore_folder / base.name, self.scratch / "convert" / base.name
        log.info("converting checkpoint %s of %d ranks for %d", base.name, base.world_size, self.place.world_size)
        try:
            convert(source, target)
            shutil.rmtree(self._restore_folder, ignore_errors=True)
            return universal.publish(self.store, base, self.claim, target)
        except Exception as error:
            cause = failure_of(error)
            raise TrainerError(
                cause.failure_class,
                f"checkpoint {base.name} of {base.world_size} ranks was not converted for {self.place.world_size}: "
                f"{cause.message}",
                cause.remedy,
            ) from error
        finally:
            shutil.rmtree(target.parent, ignore_errors=True)

    def _save(self, staged: Staged, draft: Commit) -> Commit | None:
        """All of a save but the copy, on this rank's thread; the commit on rank 0."""
        collectives.together(lambda: patiently(lambda: self._upload(staged, draft.name)), self._group)
        if not self.place.is_first:
            return None
        patiently(self.before_commit)
        draft = draft.model_copy(update={"time": datetime.now(UTC)})
        commit = patiently(lambda: self._commit(draft))
        self._retire(commit)
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
        newest = max(claim.id for claim in read_claims(self.store))
        if newest != self.claim:
            raise TrainerError(
                FailureClass.HEAD_LOST,
                f"{newest} has taken this run over from {self.claim}, which stops without a commit",
            )
        commit = draft.model_copy(update={"files": sent})
        self.store.put_bytes(commit.key, manifest(commit))
        return commit

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

    def _retire(self, commit: Commit) -> None:
        """Delete what the policy lets go; what cannot be deleted now is tried again after the next save."""
        kept = {commit.name for commit in self._kept(commit)}
        self._doomed = (self._doomed | {commit.name for commit in self.commits}) - kept
        try:
            self._delete_folders(self._doomed)
            self._doomed = set()
            if self._conversion is not None:
                universal.sweep(self.store, self.claim)
                self._conversion = None
        except TrainerError as error:
            log.warning("old checkpoints could not be deleted, for now: %s", error)

    def _sweep(self) -> None:
        """Remove what crashes, superseded groups and an interrupted retirement left behind."""
        kept = {commit.name for commit in self.commits}
        present = {entry.key.split("/")[1] for entry in self.store.list(f"{CHECKPOINTS}/")}
        # A start that froze between its claim and here must not touch what its successors wrote.
        later = {name for name in present if (parsed := parse_name(name)) and parsed[1] > self.claim}
        doomed = present - kept - later
        if doomed:
            log.info("sweeping checkpoints that do not count: %s", ", ".join(sorted(doomed)))
            self._delete_folders(doomed)
        universal.sweep(self.store, self.claim, kept=self._conversion)

    def _delete_folders(self, names: set[str]) -> None:
        for name in sorted(names):
            keys = [entry.key for entry in self.store.list(f"{CHECKPOINTS}/{name}/")]
            # COMMIT.json goes first: what is half deleted must not count.
            self.store.delete(sorted(keys, key=lambda key: not key.endswith(COMMIT_FILE)))
