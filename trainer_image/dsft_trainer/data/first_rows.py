"""The first rows of a data set, for little: what is needed to see that it can be read and holds what its format promises.

What is small is read whole, as the ranks will. Of large JSON lines only the beginning is; of large CSV and Parquet files, which
cannot be cut anywhere, nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from dsft_api.spec.identity import DatasetSource
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.checkpoint.store import Entry, Store, open_store
from dsft_trainer.data import readers
from dsft_trainer.data.formats import Column, columns_of
from dsft_trainer.data.sources import fetch, hub_error, load_rows, s3_objects

MAX_BYTES = 64 * 1024 * 1024
MAX_ROWS = 1000


def first_rows(source: DatasetSource, *, storage: StorageSpec, cache: Path, field: str) -> pa.Table | None:
    """Rows as `load_rows` gives them, all or the first ones; None if they cannot be had for little.

    Raises:
        TrainerError: as `load_rows`.
    """
    if source.uri.startswith("hf://"):
        return _of_hub(source, columns_of(source, field))
    store, entries = _files(source, storage)
    is_saved = any(entry.key in (readers.SAVED_SPLIT, readers.SAVED_SPLITS) for entry in entries)
    is_mapped = is_saved and store.uri.startswith("file://")
    if is_mapped or sum(entry.size for entry in entries) <= MAX_BYTES:
        return load_rows(source, storage=storage, cache=cache, field=field)
    first = None if is_saved else _first(entries, source.uri)
    return _beginning(store, first, cache, columns_of(source, field)) if first is not None else None


def _first(entries: Sequence[Entry], where: str) -> Entry | None:
    """The first file with anything in it, of those that `load_rows` reads: no folders below, nothing hidden."""
    if len(entries) == 1:
        return entries[0] if Path(entries[0].key).suffix in readers.SUFFIXES else None
    top = {entry.key: entry for entry in entries if "/" not in entry.key}
    return next((top[name] for name in readers.data_names(top, where) if top[name].size), None)


def bytes_of(source: DatasetSource, storage: StorageSpec, *, at_once: int | None = None) -> int:
    """What the ranks of a node fetch of a data set on S3; 0 where they read it in place, or the Hub's library keeps it.

    Of data that is streamed, its largest files, so many `at_once`.
    """
    sizes = [entry.size for entry in _files(source, storage)[1]] if source.uri.startswith("s3://") else []
    return sum(sorted(sizes, reverse=True)[:at_once])


def _files(source: DatasetSource, storage: StorageSpec) -> tuple[Store, list[Entry]]:
    if source.uri.startswith("s3://"):
        return s3_objects(source.uri, storage, "dataset")
    path = fetch(source.uri, storage=storage, cache=Path("/nonexistent"), kind="dataset", revision=source.revision)
    store = open_store((path if path.is_dir() else path.parent).absolute().as_uri())
    found = store.list() if path.is_dir() else [store.entry(path.name)]
    return store, [entry for entry in found if entry is not None]


def _beginning(store: Store, entry: Entry, cache: Path, columns: Sequence[Column]) -> pa.Table | None:
    path = cache / "beginning" / Path(entry.key).name
    if entry.size > MAX_BYTES and path.suffix not in readers.JSON_SUFFIXES:
        return None
    text = store.get_bytes(entry.key, first=MAX_BYTES) or b""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if entry.size <= MAX_BYTES else text[: text.rfind(b"\n") + 1])
    table = readers.read_path(path, columns)
    return table if table.num_rows else None


def _of_hub(source: DatasetSource, columns: Sequence[Column]) -> pa.Table:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    try:
        stream = datasets.load_dataset(
            source.uri.removeprefix("hf://"),
            source.subset,
            split=source.split or "train",
            revision=source.revision or "main",
            streaming=True,
        )
        rows = list(stream.take(MAX_ROWS))
    except (OSError, ValueError, errors.HTTPError, DatasetsError) as error:
        raise hub_error(source.uri, "dataset", error) from error
    table = pa.Table.from_pylist(rows)
    return readers.pick(table, columns, source.uri)
