"""Files of rows -> one Arrow table with the columns that the format reads, under their canonical names.

Every fault is named by file and line: found by a worker, it costs a whole run. JSON is parsed by the standard library,
since Arrow's reader turns strings that look like dates into timestamps and names no lines.
"""

import bisect
import codecs
import difflib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from dsft_api.conditions import FailureClass
from dsft_trainer.data.formats import Column
from dsft_trainer.errors import TrainerError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".parquet")

# What `datasets.save_to_disk` leaves in a folder: of one split, and of several.
SAVED_SPLIT = "state.json"
SAVED_SPLITS = "dataset_dict.json"


def read_path(path: Path, columns: Sequence[Column]) -> pa.Table:
    """Read one data file, or all data files of a folder in the order of their names.

    Raises:
        TrainerError: DataInvalid, naming the file, the line or column, and what to change.
    """
    files = data_files(path) if path.is_dir() else [path]
    tables = [_read_file(file, columns) for file in files]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise _invalid(f"the files of {path} hold different types: {error}", "write all files the same way") from error


def read_saved(folder: Path, split: str | None, columns: Sequence[Column], field: str) -> pa.Table:
    """Read what `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, without importing `datasets`.

    `split` picks one of a DatasetDict, `train` by default.

    Raises:
        TrainerError: DataInvalid, naming the folder and what is wrong with it.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = json.loads((folder / SAVED_SPLITS).read_bytes())["splits"]
        wanted = split or "train"
        if wanted not in splits:
            raise _invalid(f"{folder} has no split {wanted}, but {', '.join(splits)}", f"set {field}.split")
        folder = folder / wanted
    elif split is not None:
        raise _invalid(f"{folder} holds one split, so there is no split {split} to pick", f"remove {field}.split")
    try:
        names = [entry["filename"] for entry in json.loads((folder / SAVED_SPLIT).read_bytes())["_data_files"]]
        shards = [pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in names]
        table = pa.concat_tables(shards)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise _unreadable(folder, error, "save it again with save_to_disk") from error
    return pick(table, columns, folder)


def read_pieces(path: Path, columns: Sequence[Column], rows: int) -> Iterator[pa.Table]:
    """Read one data file some rows at a time: about `rows` of them, in their order. Nothing of an empty file.

    Raises:
        TrainerError: as `read_path`.
    """
    names = [column.source_name for column in columns]
    try:
        if path.suffix in JSON_SUFFIXES:
            pieces = _json_tables(path, columns, rows)
        elif path.suffix == ".csv":
            pieces = (pick(pa.table(batch), columns, path) for batch in _open_csv(path, columns))
        elif path.suffix == ".parquet":
            require(parquet.read_schema(path).names, columns, path)
            batches = parquet.ParquetFile(path).iter_batches(rows, columns=names)
            pieces = (pick(pa.table(batch), columns, path) for batch in batches)
        else:
            raise _unknown_suffix(path)
        yield from (piece for piece in pieces if piece.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, "correct the file") from error


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / SAVED_SPLIT).is_file() or (folder / SAVED_SPLITS).is_file()


def pick(table: pa.Table, columns: Sequence[Column], where: Path | str) -> pa.Table:
    """The columns that the format reads, under their canonical names.

    Raises:
        TrainerError: DataInvalid for a column that is not there, with those that are.
    """
    require(table.column_names, columns, where)
    return table.select([column.source_name for column in columns]).rename_columns([column.name for column in columns])


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder, as `data_names` picks them."""
    return [folder / name for name in data_names((file.name for file in folder.iterdir()), folder)]


def data_names(names: Iterable[str], where: Path | str) -> list[str]:
    """Those of the names in a folder that name data files, sorted.

    Raises:
        TrainerError: DataInvalid if there are none, or of several kinds.
    """
    picked = sorted(name for name in names if Path(name).suffix in SUFFIXES and not name.startswith((".", "_")))
    if not picked:
        raise _invalid(f"{where} holds no data files", f"put {', '.join(SUFFIXES)} files there")
    kinds = sorted({Path(name).suffix for name in picked})
    if len(kinds) > 1:
        raise _invalid(f"{where} mixes {' and '.join(kinds)} files", "keep one kind, or name one file")
    return picked


def _read_file(path: Path, columns: Sequence[Column]) -> pa.Table:
    try:
        if path.suffix in JSON_SUFFIXES:
            return _json_table(path, columns, _json_rows(path))
        if path.suffix == ".csv":
            return _read_csv(path, columns)
        if path.suffix == ".parquet":
            require(parquet.read_schema(path).names, columns, path)
            return pick(parquet.read_table(path, columns=[column.source_name for column in columns]), columns, path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, "correct the file") from error
    raise _unknown_suffix(path)


def _unknown_suffix(path: Path) -> TrainerError:
    return _invalid(
        f"{path} ends in {path.suffix or 'no extension'}, which names no data format", f"use {', '.join(SUFFIXES)}"
    )


def _read_csv(path: Path, columns: Sequence[Column]) -> pa.Table:
    return pick(csv.read_csv(path, **_csv_options(path, columns)), columns, path)


def _open_csv(path: Path, columns: Sequence[Column]) -> csv.CSVStreamingReader:
    options = _csv_options(path, columns)
    require(csv.open_csv(path, **options).schema.names, columns, path)
    # Arrow freezes a column's type after its first block: of those that nobody asked for, nothing is to be inferred.
    options["convert_options"].include_columns = [column.source_name for column in columns]
    return csv.open_csv(path, **options)


def _csv_options(path: Path, columns: Sequence[Column]) -> dict[str, Any]:
    for column in columns:
        if column.kind == "messages":
            raise _invalid(f"{path}: CSV cannot hold messages", "write them as JSON lines or Parquet")
    # Types are given, never guessed: a text column of digits is text. One thread, so that errors name the row.
    types = {column.source_name: pa.int64() if column.kind == "label" else pa.string() for column in columns}
    return {
        "read_options": csv.ReadOptions(use_threads=False),
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "convert_options": csv.ConvertOptions(column_types=types, strings_can_be_null=False),
    }


def _json_tables(path: Path, columns: Sequence[Column], rows: int) -> Iterator[pa.Table]:
    lines = _json_rows(path)
    while piece := list(itertools.islice(lines, rows)):
        yield _json_table(path, columns, piece)


def _json_table(path: Path, columns: Sequence[Column], rows: Iterable[tuple[int, dict[str, Any]]]) -> pa.Table:
    lines: list[int] = []
    values: dict[str, list[Any]] = {column.source_name: [] for column in columns}
    present: dict[str, None] = {}
    for number, row in rows:
        lines.append(number)
        present.update(dict.fromkeys(row))
        for name, cells in values.items():
            cells.append(row.get(name))
    if lines:
        require(present, columns, path)
    arrays = [_to_arrow(values[column.source_name], lines, path, column) for column in columns]
    return pa.table(arrays, names=[column.name for column in columns])


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.removeprefix(codecs.BOM_UTF8).decode().strip()
                row = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise _invalid(
                    f"{path} line {number} is not UTF-8 (byte {error.start})", "save the file as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise _invalid(
                    f"{path} line {number} is not JSON: {error.msg}", "write one JSON object a line"
                ) from error
            if line and not isinstance(row, dict):
                raise _invalid(
                    f"{path} line {number} holds a {type(row).__name__}, not an object", "write one JSON object a line"
                )
            if row is not None:
                yield number, row


def _to_arrow(values: list[Any], lines: list[int], path: Path, column: Column) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        # A type is inferred from all rows before, so "does it convert" is monotone in the number of rows.
        first = bisect.bisect_left(range(1, len(values)), 1, key=lambda count: not _converts(values[:count]))
        raise _invalid(
            f"{path} line {lines[first]}: column {column.source_name} does not fit the lines before: {error}",
            "give the column one type in all lines",
        ) from error


def _converts(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return False
    return True


def require(present: Collection[str], columns: Sequence[Column], where: Path | str) -> None:
    """Raise DataInvalid for a column that is not among those present."""
    for column in columns:
        if column.source_name in present:
            continue
        nearest = difflib.get_close_matches(column.source_name, present, n=1, cutoff=0.5)
        hint = f" (nearest: {nearest[0]})" if nearest else ""
        raise _invalid(
            f"{where} has no column {column.source_name}{hint}; it has {', '.join(present) or 'none'}",
            f"name the column in {column.field}",
        )


def _unreadable(path: Path, error: Exception, remedy: str) -> TrainerError:
    return _invalid(f"{path} cannot be read: {str(error).splitlines()[0]}", remedy)


def _invalid(message: str, remedy: str) -> TrainerError:
    return TrainerError(FailureClass.DATA_INVALID, message, remedy)
