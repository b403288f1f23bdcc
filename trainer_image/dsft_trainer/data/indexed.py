"""Tokens of a data set in one Arrow file, memory-mapped, so that all ranks of a node share its pages.

One record batch with 64-bit offsets: a row is two slices of the mapped file, with nothing copied or decoded.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Row = dict[str, NDArray[Any]]

_PARTS = b"parts"


class IndexedDataset:
    """Rows by index. Lists come as one-dimensional arrays, scalars as zero-dimensional ones; all read-only views.

    `parts`: rows of each of the data sets that follow one another in it.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._length = batch.num_rows
        self.parts: tuple[int, ...] = tuple(
            json.loads((batch.schema.metadata or {}).get(_PARTS, b"null")) or [self._length]
        )
        self._lists: dict[str, tuple[NDArray[np.int64], NDArray[Any]]] = {}
        self._scalars: dict[str, NDArray[Any]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if pa.types.is_large_list(column.type):
                self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())
            else:
                self._scalars[name] = column.to_numpy()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        row: Row = {name: values[at[index] : at[index + 1]] for name, (at, values) in self._lists.items()}
        row.update({name: values[index] for name, values in self._scalars.items() if name != "weight"})
        return row

    @property
    def weights(self) -> NDArray[np.int64]:
        """What each row counts in the loss: its trained tokens, or 1 for classification."""
        return self._scalars["weight"]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self._lists["input_ids"][0])

    @property
    def positions(self) -> int:
        """Positions that a model needs for the longest row, or the longest in a packed sequence."""
        if "position_ids" in self._lists:
            return int(self._lists["position_ids"][1].max(initial=-1)) + 1
        return int(self.lengths.max(initial=0))

    @cached_property
    def digest(self) -> str:
        """`sha256:...` over all columns: equal digests mean the same tokens in the same order. Reads the whole file."""
        parts = {
            f"{name}.{part}": values
            for name, pair in self._lists.items()
            for part, values in zip(("offsets", "values"), pair, strict=True)
        }
        total = hashlib.sha256()
        for name, values in {**parts, **self._scalars}.items():
            total.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
            total.update(np.ascontiguousarray(values).data)
        return f"sha256:{total.hexdigest()}"


def write_indexed(tables: Sequence[pa.Table], path: Path) -> None:
    """Write what `tokenize` or `pack` returned, one after the other; the file appears whole or not at all.

    One process of a node does it.
    """
    table = pa.concat_tables(tables)
    wide = pa.schema(
        pa.field(field.name, pa.large_list(field.type.value_type) if pa.types.is_list(field.type) else field.type)
        for field in table.schema
    ).with_metadata({_PARTS: json.dumps([part.num_rows for part in tables])})
    (batch,) = table.cast(wide).combine_chunks().to_batches()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    part.replace(path)


def open_indexed(path: Path) -> IndexedDataset:
    """Map a file of `write_indexed`. Pages are read when a row is asked for."""
    return IndexedDataset(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))
