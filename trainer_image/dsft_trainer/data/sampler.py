"""Which rows each rank sees at each step. Pure numpy, and a function of (seed, step) alone.

The global batch does not depend on the number of ranks, and any step can be asked for directly: a run resumes at its
step, on more or fewer ranks, with nothing to skip and nothing to store.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dsft_api.conditions import FailureClass
from dsft_trainer.data.formats import TRAIN_FIELD
from dsft_trainer.data.shard_order import ShardOrder
from dsft_trainer.data.shuffle import shuffled
from dsft_trainer.errors import TrainerError

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Keep the random streams of the hold-out, of mixtures and of groups apart from those of the epochs.
_HOLD_OUT = 0x5EED
_MIXTURE = 0x3117
_GROUPS = 0x6209

# Batches among which rows are sorted by length: as many as Hugging Face's LengthGroupedSampler has, and for its reason: enough
# for like lengths, few enough that which rows meet stays random.
_WINDOW = 50


@dataclass(frozen=True)
class Member:
    """One data set of a mixture."""

    rows: int
    weight: float


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> Indices:
    """A permutation of range(n), read-only; another one for each epoch."""
    order = shuffled((seed, epoch), n)
    order.flags.writeable = False
    return order


def quotas(members: Sequence[Member]) -> list[int]:
    """How many samples of an epoch each member gives: as many in all as there are rows, by weight, largest remainders up."""
    total, weight = sum(member.rows for member in members), math.fsum(member.weight for member in members)
    exact = [total * member.weight / weight for member in members]
    whole = [int(share) for share in exact]
    nearest_up = sorted(range(len(members)), key=lambda number: whole[number] - exact[number])
    for number in nearest_up[: total - sum(whole)]:
        whole[number] += 1
    return whole


@functools.lru_cache(maxsize=4)
def mixed(seed: int, epoch: int, members: tuple[Member, ...]) -> Indices:
    """The samples of an epoch over members that follow one another in one data set, read-only.

    Where in the epoch a member is drawn is shuffled; which of its rows, is the next of its own shuffled passes, which go on from
    epoch to epoch: no row of a member comes again before all others of it have come.
    """
    counts = quotas(members)
    turns = np.repeat(np.arange(len(members)), counts)[shuffled((seed, _MIXTURE, epoch), sum(counts))]
    order = np.empty(len(turns), dtype=np.int64)
    first = 0
    for number, (member, count) in enumerate(zip(members, counts, strict=True)):
        passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), member.rows)
        of_passes = np.split(places, np.flatnonzero(np.diff(passes)) + 1)
        drawn = [
            shuffled((seed, _MIXTURE, int(p), number), member.rows)[places]
            for p, places in zip(np.unique(passes), of_passes, strict=True)
        ]
        order[turns == number] = first + np.concatenate(drawn)
        first += member.rows
    order.flags.writeable = False
    return order


def grouped(order: Indices, lengths: Indices, batch_size: int, key: tuple[int, ...]) -> Indices:
    """The full batches of `order` with rows of like length in each: rows change places within windows of 50 batches.

    The batches of a window then come in an order that `key` decides. The batch with the longest row comes first of all: what
    does not fit into memory fails at once.
    """
    order = order[: len(order) // batch_size * batch_size]
    windows = np.split(order, range(_WINDOW * batch_size, len(order), _WINDOW * batch_size))
    batches = np.concatenate(
        [
            rows[np.argsort(-lengths[rows], kind="stable")].reshape(-1, batch_size)[
                shuffled((*key, _GROUPS, number), len(rows) // batch_size)
            ]
            for number, rows in enumerate(windows)
        ]
    )
    longest = lengths[batches].max(axis=1).argmax()
    batches[[0, longest]] = batches[[longest, 0]]
    return batches.reshape(-1)


@dataclass(frozen=True)
class GlobalBatches:
    """The global batch of every optimizer step. The last, incomplete batch of an epoch is dropped.

    `step` samples consumed are `step * global_batch_size`. `members`: the parts of the rows, if they are a mixture. `unit`: what
    a row is called in errors. `lengths`: tokens of each row, if those of like length are to be in one batch. `shards`: the order,
    if the rows are in shards; then neither of the two.

    Raises:
        TrainerError: DataInvalid if there are fewer rows than one batch needs, or none for a member of the mixture.
    """

    n: int
    global_batch_size: int
    seed: int
    members: tuple[Member, ...] = ()
    unit: str = "rows"
    lengths: Indices | None = field(default=None, compare=False, repr=False)
    shards: ShardOrder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for index, count in enumerate(quotas(self.members)):
            if count == 0:
                weight = f"spec.data.mixture[{index}].weight {self.members[index].weight:g}"
                raise TrainerError(
                    FailureClass.DATA_INVALID,
                    f"{weight} gives it no sample in an epoch of {self.n}",
                    "raise the weight, or remove the data set",
                )
        if self.n < self.global_batch_size:
            raise TrainerError(
                FailureClass.DATA_INVALID,
                f"the training data has {self.n} {self.unit}, fewer than spec.training.globalBatchSize"
                f" {self.global_batch_size}",
                f"lower globalBatchSize to {self.n} or less, or add rows",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the rows."""
        return self.n // self.global_batch_size

    def batch(self, step: int) -> Indices:
        """The `global_batch_size` row indices of optimizer step `step`, counted from 0."""
        epoch, start, stop = self._place(step)
        return self.shards.rows_at(epoch, start, stop) if self.shards else self._order(epoch)[start:stop]

    def shards_ahead(self, step: int) -> list[int]:
        """The shards that the batches of this step and of many after it are in; none where rows are not in shards."""
        return self.shards.shards_at(*self._place(step)) if self.shards else []

    def _place(self, step: int) -> tuple[int, int, int]:
        """(epoch, where in it the step's batch begins, where it ends)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        return epoch, start, start + self.global_batch_size

    @cached_property
    def _order(self) -> Callable[[int], Indices]:
        return functools.lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> Indices:
        order = mixed(self.seed, epoch, self.members) if self.members else permutation(self.seed, epoch, self.n)
        if self.lengths is None:
            return order
        return grouped(order, self.lengths, self.global_batch_size, (self.seed, epoch))


def split(indices: Indices, rank: int, world_size: int, micro_batch_size: int) -> list[Indices]:
    """This rank's share of a global batch: one array of `micro_batch_size` indices per gradient-accumulation step.

    Raises:
        TrainerError: ConfigInvalid if the batch does not divide evenly.
    """
    per_micro_step = world_size * micro_batch_size
    if len(indices) % per_micro_step:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"spec.training.globalBatchSize {len(indices)} is not a multiple of {world_size} ranks"
            f" x spec.execution.microBatchSize {micro_batch_size}",
            f"use a multiple of {per_micro_step}, or other numbers of ranks or microBatchSize",
        )
    return list(indices.reshape(-1, world_size, micro_batch_size)[:, rank])


def eval_batches(n: int, rank: int, world_size: int, batch_size: int) -> list[tuple[Indices, Mask]]:
    """This rank's share of range(n), as (indices, valid), each of length `batch_size`.

    Every rank gets the same number of batches, since each forward is a collective under ZeRO-3. Where rows run out a row
    is repeated with valid False, so that each row counts exactly once over all ranks.
    """
    batches = -(-n // (world_size * batch_size))
    slots = np.arange(batches * world_size * batch_size).reshape(batches, world_size, batch_size)[:, rank]
    return [(np.minimum(row, n - 1), row < n) for row in slots]


def split_eval(table: pa.Table, fraction: float, seed: int, field: str = TRAIN_FIELD) -> tuple[pa.Table, pa.Table]:
    """(train, eval): `fraction` of the rows, at least one, held out by the seed; both keep the order of the table.

    Raises:
        TrainerError: DataInvalid if no row would be left to train on.
    """
    rows = table.num_rows
    held_out = max(1, round(rows * fraction))
    if held_out >= rows:
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"spec.data.evalFraction {fraction} holds out all of the {rows} rows of {field}",
            "add rows, or give spec.data.eval instead",
        )
    is_held_out = np.zeros(rows, dtype=bool)
    is_held_out[shuffled((seed, _HOLD_OUT, rows), rows)[:held_out]] = True
    return table.filter(pa.array(~is_held_out)), table.filter(pa.array(is_held_out))
