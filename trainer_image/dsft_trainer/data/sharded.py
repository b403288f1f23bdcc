"""Tokens of a data set in shards in storage, of which a node holds those that it needs now.

A shard is one file of `indexed`. Ranks of a node share what one of them has fetched; what is no longer wanted is deleted. So
the data may be larger than any disk.
"""

import fcntl
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.files import fetch
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.data.indexed import IndexedDataset, Row, open_indexed
from dsft_trainer.data.shard_order import ShardOrder
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
"""Of the shards of one file, written when they are whole."""


@dataclass(frozen=True)
class Shard:
    """One shard: a file below the folder `place` in storage."""

    place: str
    file: CommittedFile
    rows: int


class ShardedDataset:
    """Rows by index, as `IndexedDataset`; a row whose shard is not here waits for it.

    `weights`: what each row counts in the loss. `positions`: those of the longest row.
    """

    def __init__(
        self, store: Store, shards: Sequence[Shard], weights: NDArray[np.int64], positions: int, folder: Path, seed: int
    ) -> None:
        self.weights = weights
        self.positions = positions
        self.order = ShardOrder(tuple(shard.rows for shard in shards), seed)
        self._store = store
        self._shards = shards
        self._folder = folder
        self._open: dict[int, IndexedDataset] = {}
        self._coming: dict[int, Future[IndexedDataset]] = {}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="shards")

    def __len__(self) -> int:
        return self.order.n

    def __getitem__(self, index: int) -> Row:
        number, place = self.order.shard_of(index)
        shard = self._open.get(number)
        if shard is None:
            coming = self._coming.pop(number, None)
            shard = self._open[number] = self._came(coming, number) if coming else self._here(number)
        return shard[place]

    def _came(self, coming: "Future[IndexedDataset]", number: int) -> IndexedDataset:
        """What was fetched ahead. Storage that was away by then may long be back: it is asked once more."""
        try:
            return coming.result()
        except TrainerError as error:
            log.warning("shard %d could not be fetched ahead: %s", number, error)
            return self._here(number)

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these shards in the background, in their order, and let go of all others."""
        wanted = set(numbers)
        for gone in (self._open.keys() | self._coming.keys()) - wanted:
            self._open.pop(gone, None)
            coming = self._coming.pop(gone, None)
            if coming is None or not coming.cancel():
                self._pool.submit(self._discard, gone)
        for number in numbers:
            if number not in self._open and number not in self._coming:
                self._coming[number] = self._pool.submit(self._here, number)

    def close(self) -> None:
        """Fetch nothing more; what is on its way is waited for."""
        self._pool.shutdown(cancel_futures=True)

    def _here(self, number: int) -> IndexedDataset:
        """A shard, fetched by whichever rank of the node comes first.

        Raises:
            TrainerError: Unknown if it is missing or damaged in storage. What says that it is whole is deleted then: the next
                attempt makes its tokens again.
        """
        shard, folder = self._shards[number], self._folder / str(number)
        with self._alone(number):
            path = folder / shard.file.path
            if not path.exists() and not self._fetch(shard, folder):
                path.unlink(missing_ok=True)
                self._store.delete([f"{shard.place}/{MANIFEST}"])
                raise TrainerError(
                    FailureClass.UNKNOWN,
                    f"{self._store.uri}/{shard.place}/{shard.file.path} is missing or damaged",
                    "start the run again: its tokens are made anew",
                )
            return open_indexed(path)

    def _fetch(self, shard: Shard, folder: Path) -> bool:
        arriving = folder.with_name(f"{folder.name}.part")
        if not fetch(self._store, shard.place, [shard.file], arriving):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        (arriving / shard.file.path).rename(folder / shard.file.path)
        return True

    def _discard(self, number: int) -> None:
        """Other ranks of the node that still read it keep what they have mapped."""
        with self._alone(number):
            (self._folder / str(number) / self._shards[number].file.path).unlink(missing_ok=True)

    @contextmanager
    def _alone(self, number: int) -> Iterator[None]:
        """Hold a shard's lock, against other threads and ranks of the node. The kernel gives it back if we are killed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{number}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
