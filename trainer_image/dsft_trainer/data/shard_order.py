"""The order of rows that are in shards, of which only some are at hand. Pure numpy, and a function of (seed, epoch) alone.

Shards come in random order, and rows are shuffled within windows of some shards: a batch is drawn from one window, or from two
that follow one another, and any place in an epoch can be asked for without the rows before it.
"""

import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsft_trainer.data.shuffle import shuffled

Indices = NDArray[np.int64]

# Shards whose rows are shuffled together.
WINDOW = 8
# Keep the random streams of shards and of their rows apart from those of the epochs.
_SHARDS = 0x54A4
_ROWS = 0x40B5


@dataclass(frozen=True)
class ShardOrder:
    """Rows that follow one another in shards of `rows` each; none is empty."""

    rows: tuple[int, ...]
    seed: int

    @cached_property
    def _firsts(self) -> Indices:
        """The number of each shard's first row, and of all rows."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @property
    def n(self) -> int:
        """All rows."""
        return int(self._firsts[-1])

    def rows_at(self, epoch: int, start: int, stop: int) -> Indices:
        """The rows at these places of an epoch."""
        windows = self._windows_at(epoch, start, stop)
        begin = int(self._starts(epoch)[windows.start])
        rows = np.concatenate([self._window(epoch, number) for number in windows])
        return rows[start - begin : stop - begin]

    def shards_at(self, epoch: int, start: int, stop: int) -> list[int]:
        """The shards that these places, and those of the window after them, are in."""
        here = self._windows_at(epoch, start, stop)
        ahead = self._shards(epoch)[here.start * WINDOW : (here.stop + 1) * WINDOW].tolist()
        return ahead if here.stop * WINDOW < len(self.rows) else [*ahead, *self._shards(epoch + 1)[:WINDOW].tolist()]

    def shard_of(self, row: int) -> tuple[int, int]:
        """(the shard that a row is in, its place there)."""
        shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return shard, row - int(self._firsts[shard])

    def _windows_at(self, epoch: int, start: int, stop: int) -> range:
        first, last = np.searchsorted(self._starts(epoch), [start, stop - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    @cached_property
    def _shards(self) -> "functools._lru_cache_wrapper[Indices]":
        return functools.lru_cache(maxsize=4)(lambda epoch: shuffled((self.seed, _SHARDS, epoch), len(self.rows)))

    @cached_property
    def _starts(self) -> "functools._lru_cache_wrapper[Indices]":
        """The place in an epoch at which each window starts."""

        def starts(epoch: int) -> Indices:
            ends = np.cumsum(np.asarray(self.rows, dtype=np.int64)[self._shards(epoch)])
            return np.concatenate([[0], ends[WINDOW - 1 :: WINDOW]])[: -(-len(self.rows) // WINDOW)]

        return functools.lru_cache(maxsize=4)(starts)

    @cached_property
    def _window(self) -> "functools._lru_cache_wrapper[Indices]":
        """The rows of a window of an epoch, in their order."""

        def window(epoch: int, number: int) -> Indices:
            shards = self._shards(epoch)[number * WINDOW : (number + 1) * WINDOW]
            rows = np.concatenate([np.arange(self._firsts[shard], self._firsts[shard + 1]) for shard in shards])
            return rows[shuffled((self.seed, _ROWS, epoch, number), len(rows))]

        return functools.lru_cache(maxsize=3)(window)
