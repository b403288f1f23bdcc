"""What a group start goes on from: found, fetched, converted where it must be, and loaded.

The newest commit of this run whose files match their checksums; else the commit of another run that `spec.startFrom` names (see
`origin`); else nothing. One of another number of ranks is converted once, by rank 0 (see `universal`).
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from dsft_api.conditions import FailureClass
from dsft_trainer import collectives
from dsft_trainer.checkpoint import files, universal
from dsft_trainer.checkpoint.commits import ClaimId, Commit, Patience
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.checkpoint.origin import Origin
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.runtime import Place

log = logging.getLogger(__name__)

Convert = Callable[[Path, Path], None]
"""Makes a universal checkpoint, in the second folder, of the whole one in the first."""


class Loading(Protocol):
    """What takes the state over. All calls are collective."""

    def load(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`, which holds this rank's files."""
        ...

    def load_universal(self, folder: Path, tag: str) -> None:
        """Take the state over from `folder/tag`, a converted checkpoint that all ranks of this node read."""
        ...

    def load_weights(self, folder: Path, tag: str) -> None:
        """Take only the weights over from such a checkpoint."""
        ...


class Restorer:
    """One group start's way to its state. All methods are collective: `find`, then `convert`, then `load`.

    `origin` opens the commit of another run to start from, on rank 0, when there is none of this run.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        scratch: Path,
        *,
        on_world_size_change: Literal["refuse", "convert"] = "convert",
        convert: Convert = universal.convert,
        origin: Callable[[], Origin] | None = None,
    ) -> None:
        self.store = store
        self.place = place
        self.scratch = scratch
        self.commits: list[Commit] = []
        self.damaged: list[str] = []
        self.base: Commit | None = None
        self.origin: Origin | None = None
        self.conversion: universal.Conversion | None = None
        self._may_convert = on_world_size_change == "convert"
        self._convert = convert
        self._open_origin = origin

    def find(self) -> None:
        """Find what to go on from, and fetch what this rank needs of it.

        A commit whose files do not match their checksums is passed over for the one before it.

        Raises:
            TrainerError: ConfigInvalid if it was written by another number of ranks and may not be converted, or if another
                run's is not what it was.
        """
        commits = collectives.on_first(self.place.is_first, lambda: read_commits(self.store))
        while commits:
            candidate = commits[-1]
            if self._fetched_everywhere(candidate):
                break
            log.warning("checkpoint %s does not match its checksums: falling back to the one before it", candidate.name)
            self.damaged.append(candidate.name)
            commits = commits[:-1]
        self.commits = commits
        self.base = commits[-1] if commits else self._adopted()

    @property
    def first_step(self) -> int:
        """Steps already done."""
        return 0 if self.base is None or self._weights_only else self.base.step

    @property
    def patience(self) -> Patience | None:
        """What early stopping knows by then. What another run waited for, by a metric of its own perhaps, counts not."""
        return None if self.base is None or self.origin is not None else self.base.patience

    @property
    def resized(self) -> bool:
        """Whether the base was written by another number of ranks."""
        return self.base is not None and self.base.world_size != self.place.world_size

    @property
    def must_convert(self) -> bool:
        """Whether the base must be converted before it is loaded: weights alone come out of a universal one only."""
        return self.resized or self._weights_only

    def check_end(self, total_steps: int) -> None:
        """Refuse to go on with another run's training where nothing is left of it.

        Raises:
            TrainerError: ConfigInvalid, naming both steps.
        """
        if self.origin is not None and self.first_step >= total_steps:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"spec.startFrom: {self.origin.uri} is at step {self.first_step}, and training ends at step {total_steps}",
                "raise spec.training.maxSteps (or epochs): they count from the other run's beginning; or write mode: weights",
            )

    def convert(self, claim: ClaimId) -> None:
        """Convert a base that must be, unless a start before this one has, and fetch the result.

        Raises:
            TrainerError: whatever kept rank 0 from it.
        """
        base = self.base
        if base is None or not self.must_convert or self.conversion is not None:
            return
        self.conversion = collectives.on_first(self.place.is_first, lambda: self._converted(base, claim))
        if not self._conversion_fetched(self.conversion):
            raise TrainerError(FailureClass.UNKNOWN, f"the conversion of {base.name} did not arrive whole on all nodes")

    def load(self, state: Loading) -> None:
        """Load the files that `find` and `convert` fetched."""
        if self.base is None:
            return
        if not self.must_convert:
            state.load(self._restore_folder, self.base.name)
            shutil.rmtree(self._restore_folder, ignore_errors=True)
            return
        load = state.load_weights if self._weights_only else state.load_universal
        load(self._universal_folder, self.base.name)
        # All ranks of a node read the same files.
        collectives.barrier()
        shutil.rmtree(self._universal_folder, ignore_errors=True)

    @property
    def _restore_folder(self) -> Path:
        return self.scratch / "restore" / f"rank-{self.place.rank}"

    @property
    def _universal_folder(self) -> Path:
        """Shared by the ranks of a node."""
        return self.scratch / "restore" / "universal"

    @property
    def _weights_only(self) -> bool:
        return self.origin is not None and self.origin.weights_only

    def _adopted(self) -> Commit | None:
        """The commit of another run to start from, fetched; None if there is none to start from."""
        if self._open_origin is None:
            return None
        self.origin = collectives.on_first(self.place.is_first, self._open_origin)
        commit = self.origin.commit
        if not self._fetched_everywhere(commit):
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"spec.startFrom: {self.origin.uri} does not match its checksums",
                "make a new run that names another one in spec.startFrom.checkpoint",
            )
        return commit

    def _fetched_everywhere(self, commit: Commit) -> bool:
        """Whether all ranks have what they need of a commit; False if a file is missing or differs."""
        if commit.world_size == self.place.world_size and not self._weights_only:
            return all(collectives.gather(collectives.together(lambda: self._fetch(commit, {self.place.rank}))))
        if not self._weights_only:
            self._refuse_unless_convertible(commit)
        found = collectives.on_first(self.place.is_first, lambda: universal.find(self.store, commit))
        if found is not None and self._conversion_fetched(found):
            self.conversion = found
            return True
        return collectives.on_first(self.place.is_first, lambda: self._fetch(commit, set(range(commit.world_size))))

    def _refuse_unless_convertible(self, commit: Commit) -> None:
        if not self._may_convert:
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"spec.checkpoint.onWorldSizeChange is refuse: checkpoint {commit.name} was written by "
                f"{commit.world_size} ranks, and {self.place.world_size} would load it",
                f"write convert there, run with {commit.world_size} ranks again (spec.nodePools, or --workers), "
                "or start again with --fresh",
            )

    def _fetch(self, commit: Commit, ranks: set[int]) -> bool:
        wanted = [file for file in commit.files if file.rank in ranks]
        store = self.origin.store if self.origin else self.store
        return files.fetch(store, commit.folder, wanted, self._restore_folder / commit.name)

    def _conversion_fetched(self, conversion: universal.Conversion) -> bool:
        """Whether all nodes have a conversion, each by its first rank."""
        folder = self._universal_folder / conversion.source

        def fetch() -> bool:
            return not self.place.is_first_on_node or conversion.fetch(self.store, folder)

        return all(collectives.gather(collectives.together(fetch)))

    def _converted(self, base: Commit, claim: ClaimId) -> universal.Conversion:
        """Convert the base, whose files are here, and commit the result; on rank 0."""
        source, target = self._restore_folder / base.name, self.scratch / "convert" / base.name
        log.info("converting checkpoint %s of %d ranks for %d", base.name, base.world_size, self.place.world_size)
        try:
            self._convert(source, target)
            shutil.rmtree(self._restore_folder, ignore_errors=True)
            return universal.publish(self.store, base, claim, target)
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
