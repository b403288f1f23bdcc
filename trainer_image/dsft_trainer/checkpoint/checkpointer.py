"""Saves, restores and retires checkpoints: DeepSpeed's shards plus RNG, committed by one manifest written last.

Order of a save: every rank writes and uploads its files, then its `rank-<r>.json`; after a barrier rank 0 reads those
manifests, checks that no newer group start has claimed the run, and writes COMMIT.json. A kill at any point leaves either
a whole checkpoint or a folder without COMMIT.json, which nobody reads and the next start sweeps.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from dsft_api.conditions import FailureClass
from dsft_api.layout import CHECKPOINTS
from dsft_trainer import collectives
from dsft_trainer.checkpoint.commits import (
    COMMIT_FILE,
    ClaimId,
    Commit,
    CommittedFile,
    commit_name,
    superfluous,
)
from dsft_trainer.checkpoint.listing import Retention, make_claim, manifest, read_claims, read_commits
from dsft_trainer.checkpoint.store import ObjectMissingError, Store, put_files
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Place

log = logging.getLogger(__name__)
_FILES = TypeAdapter(tuple[CommittedFile, ...])


class Shards(Protocol):
    """What is saved: the engine's state of this rank. Both calls are collective."""

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's files into `folder/tag`."""
        ...

    def load(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`, which holds this rank's files."""
        ...


@dataclass(frozen=True)
class Identity:
    """What every commit of a run has in common."""

    spec_hash: str
    zero_stage: int
    precision: str
    versions: Mapping[str, str]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Checkpointer:
    """One group start's view of the run's checkpoints. All methods but the constructor are collective."""

    def __init__(self, store: Store, place: Place, scratch: Path, identity: Identity, retention: Retention) -> None:
        self.store = store
        self.place = place
        self.scratch = scratch
        self.identity = identity
        self.retention = retention
        self.commits: list[Commit] = []
        self.base: Commit | None = None
        self._claim: ClaimId | None = None

    @property
    def claim(self) -> ClaimId:
        """This group start. Known after `begin`."""
        if self._claim is None:
            raise RuntimeError("begin() has not been called")
        return self._claim

    def begin(self, attempt: int) -> Commit | None:
        """Find the newest whole commit, fetch this rank's files of it, and claim a group start based on it.

        Returns the commit to `load`, or None to start from the beginning. A commit whose files do not match their
        checksums is passed over for the one before it.

        Raises:
            TrainerError: ConfigInvalid if the commit was written by another number of ranks.
        """
        commits = collectives.on_first(self.place.is_first, lambda: read_commits(self.store))
        while commits:
            candidate = commits[-1]
            self._refuse_other_world_size(candidate)
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

    def load(self, shards: Shards) -> None:
        """Load the files that `begin` fetched."""
        if self.base is None:
            return
        shards.load(self._restore_folder, self.base.name)
        shutil.rmtree(self._restore_folder, ignore_errors=True)

    def save(self, shards: Shards, *, step: int, samples: int, epoch: float, metrics: Mapping[str, float]) -> Commit:
        """Write, upload, verify and commit one checkpoint, then apply the retention policy.

        Raises:
            TrainerError: HeadLost if a newer group start has claimed the run: this one is a zombie and must stop.
        """
        name = commit_name(step, self.claim)
        folder = self.scratch / "save" / f"rank-{self.place.rank}"
        shards.save(folder, name)
        collectives.together(lambda: self._upload(folder / name, name))
        shutil.rmtree(folder, ignore_errors=True)
        draft = Commit(
            name=name,
            claim=self.claim,
            step=step,
            samples=samples,
            epoch=epoch,
            world_size=self.place.world_size,
            zero_stage=self.identity.zero_stage,
            precision=self.identity.precision,
            spec_hash=self.identity.spec_hash,
            versions=dict(self.identity.versions),
            metrics=dict(metrics),
            files=(),
            time=datetime.now(UTC),
        )
        commit = collectives.on_first(self.place.is_first, lambda: self._commit(draft))
        self.commits = [*self.commits, commit]
        self._retire()
        return commit

    @property
    def _restore_folder(self) -> Path:
        return self.scratch / "restore" / f"rank-{self.place.rank}"

    def _refuse_other_world_size(self, commit: Commit) -> None:
        if commit.world_size != self.place.world_size:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"checkpoint {commit.name} was written by {commit.world_size} ranks, and {self.place.world_size} would load it",
                f"run with {commit.world_size} ranks again (spec.nodePools, or --workers), or start again with --fresh",
            )

    def _fetched_everywhere(self, commit: Commit) -> bool:
        return all(collectives.gather(collectives.together(lambda: self._fetch(commit))))

    def _fetch(self, commit: Commit) -> bool:
        """Download this rank's files; False if one is missing or differs."""
        target = self._restore_folder / commit.name
        for file in commit.files:
            if file.rank != self.place.rank:
                continue
            path = target / file.path
            try:
                self.store.get_file(f"{CHECKPOINTS}/{commit.name}/{file.path}", path)
            except ObjectMissingError:
                return False
            if path.stat().st_size != file.size or _sha256(path) != file.sha256:
                return False
        return True

    def _upload(self, folder: Path, name: str) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [
            CommittedFile(
                path=path.relative_to(folder).as_posix(),
                size=path.stat().st_size,
                sha256=_sha256(path),
                rank=self.place.rank,
            )
            for path in paths
        ]
        put_files(self.store, [(folder / file.path, f"{CHECKPOINTS}/{name}/{file.path}") for file in files])
        self.store.put_bytes(f"{CHECKPOINTS}/{name}/rank-{self.place.rank}.json", _FILES.dump_json(tuple(files)))

    def _commit(self, draft: Commit) -> Commit:
        manifests = [
            self.store.get_bytes(f"{CHECKPOINTS}/{draft.name}/rank-{rank}.json") or b"[]"
            for rank in range(draft.world_size)
        ]
        files = tuple(file for text in manifests for file in _FILES.validate_json(text))
        sizes = {entry.key: entry.size for entry in self.store.list(f"{CHECKPOINTS}/{draft.name}/")}
        short = [f.path for f in files if sizes.get(f"{CHECKPOINTS}/{draft.name}/{f.path}") != f.size]
        if short or {file.rank for file in files} != set(range(draft.world_size)):
            raise TrainerError(
                FailureClass.UNKNOWN, f"checkpoint {draft.name} did not arrive whole in {self.store.uri}: {short}"
            )
        newest = max(claim.id for claim in read_claims(self.store))
        if newest != self.claim:
            raise TrainerError(
                FailureClass.HEAD_LOST,
                f"{newest} has taken this run over from {self.claim}, which stops without a commit",
            )
        commit = draft.model_copy(update={"files": files})
        self.store.put_bytes(commit.key, manifest(commit))
        return commit

    def _retire(self) -> None:
        gone = superfluous(
            self.commits,
            keep_last=self.retention.keep_last,
            keep_best=self.retention.keep_best,
            metric=self.retention.metric,
            larger_is_better=self.retention.larger_is_better,
        )
        self.commits = [commit for commit in self.commits if commit not in gone]
        if self.place.is_first and gone:
            self._delete_folders({commit.name for commit in gone})

    def _sweep(self) -> None:
        """Remove what crashes, superseded groups and an interrupted retirement left behind."""
        kept = {commit.name for commit in self.commits}
        present = {entry.key.split("/")[1] for entry in self.store.list(f"{CHECKPOINTS}/")}
        if present - kept:
            log.info("sweeping checkpoints that do not count: %s", ", ".join(sorted(present - kept)))
            self._delete_folders(present - kept)

    def _delete_folders(self, names: set[str]) -> None:
        for name in sorted(names):
            keys = [entry.key for entry in self.store.list(f"{CHECKPOINTS}/{name}/")]
            # COMMIT.json goes first: what is half deleted must not count.
            self.store.delete(sorted(keys, key=lambda key: not key.endswith(COMMIT_FILE)))
