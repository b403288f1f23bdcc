"""Several short rows in one sequence, so that a batch holds tokens rather than padding.

Rows stay whole: best-fit decreasing puts each one, the longest first, where the least room is left over (Ding et al., arXiv
2404.10830). Position ids begin at 0 with each row: by them transformers makes the mask that keeps rows apart.
"""

from bisect import bisect_left, insort

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dsft_trainer.data.tokens import IGNORED


def best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Which rows go together: lists of row numbers of at most `capacity` tokens in sum. The same for the same lengths.

    Each length is `capacity` at most.
    """
    sequences: list[list[int]] = []
    spaces: list[int] = []
    with_space: dict[int, list[int]] = {}
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            number, space = len(sequences), capacity
            sequences.append([])
        else:
            space = spaces[at]
            number = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        sequences[number].append(row)
        if left := space - length:
            if left not in with_space:
                insort(spaces, left)
                with_space[left] = []
            with_space[left].append(number)
    return sequences


def pack(tokens: pa.Table, max_length: int) -> pa.Table:
    """What `tokenize` made for causal-lm, as sequences of at most `max_length` tokens, with `position_ids` list<int32>.

    The first token of a row is no target, as it was none before: what a row counts in the loss stays the same.
    """
    lengths = _lengths(tokens["input_ids"])
    sequences = best_fit(lengths, max_length)
    order = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in sequences])
    ids, labels = (_values(tokens[name], order) for name in ("input_ids", "labels"))
    ends = np.cumsum(lengths[order])
    starts = ends - lengths[order]
    labels[starts] = IGNORED
    positions = (np.arange(len(ids)) - np.repeat(starts, lengths[order])).astype(np.int32)
    last_rows = np.cumsum([len(rows) for rows in sequences]) - 1
    offsets = np.concatenate([[0], ends[last_rows]])
    columns = {
        name: pa.LargeListArray.from_arrays(offsets, values)
        for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
    }
    return pa.table({**columns, "weight": np.add.reduceat((labels != IGNORED).astype(np.int64), offsets[:-1])})


def _lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in lists.chunks]).astype(np.int64)


def _values(lists: pa.ChunkedArray, order: NDArray[np.int64]) -> NDArray[np.int32]:
    """The items of the lists one after the other, in this order of the lists."""
    wide = lists.cast(pa.large_list(lists.type.value_type)).combine_chunks()
    return wide.take(pa.array(order)).flatten().to_numpy().copy()
