"""Data that is never at hand as a whole: each of its files becomes shards of tokens in the run's folder.

A file is done when its manifest is there: a restart goes on with the others, and how many ranks share the work changes nothing.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from dsft_api.base import ApiModel
from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.layout import TOKENS
from dsft_api.spec.identity import DatasetSource
from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.files import fetch as fetch_files
from dsft_trainer.checkpoint.files import upload
from dsft_trainer.checkpoint.store import Store, in_parallel
from dsft_trainer.data import readers
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.formats import TRAIN_FIELD, columns_of
from dsft_trainer.data.indexed import open_indexed, write_indexed
from dsft_trainer.data.packing import pack
from dsft_trainer.data.sharded import MANIFEST, Shard, ShardedDataset
from dsft_trainer.data.sources import fetch, refuse_unused, s3_objects
from dsft_trainer.data.tokens import ROWS_PER_CALL, Encoder
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

# 32 MiB of ids and labels: fetched in a second, and some hundred of them fit onto any disk.
SHARD_TOKENS = 2**22
WEIGHTS = "weights.npy"


class FileManifest(ApiModel):
    """The shards of one file, in the order of its rows, and `WEIGHTS`, which has the weights of all of them."""

    shards: tuple[CommittedFile, ...]
    rows: tuple[int, ...]
    positions: int
    weights: CommittedFile | None = None


@dataclass(frozen=True)
class SourceFiles:
    """The data files of a source, in the order of their names."""

    source: DatasetSource
    job: Job
    names: tuple[str, ...]
    uris: tuple[str, ...]

    @classmethod
    def of(cls, job: Job, source: DatasetSource, cache: Path) -> "SourceFiles":
        """Those that the source's URI names: one file, or all of a folder.

        Raises:
            TrainerError: DataInvalid if there are none.
        """
        refuse_unused(source, "subset", TRAIN_FIELD)
        refuse_unused(source, "split", TRAIN_FIELD)
        if source.uri.startswith("s3://"):
            refuse_unused(source, "revision", TRAIN_FIELD)
            store, entries = s3_objects(source.uri, job.spec.storage, "dataset")
            names = readers.data_names((entry.key for entry in entries if "/" not in entry.key), source.uri)
            return cls(source, job, tuple(names), tuple(f"{store.uri}/{name}" for name in names))
        path = fetch(source.uri, storage=job.spec.storage, cache=cache, kind="dataset", revision=source.revision)
        files = readers.data_files(path) if path.is_dir() else [path]
        return cls(source, job, tuple(file.name for file in files), tuple(file.absolute().as_uri() for file in files))

    def only(self, names: tuple[str, ...]) -> "SourceFiles":
        """Those of these names.

        Raises:
            TrainerError: DataInvalid for one that is not there.
        """
        uris = dict(zip(self.names, self.uris, strict=True))
        if gone := [name for name in names if name not in uris]:
            raise TrainerError(
                FailureClass.DATA_INVALID, f"{self.source.uri} has no {gone[0]} here", "mount the same data"
            )
        return replace(self, names=names, uris=tuple(uris[name] for name in names))

    @contextmanager
    def local(self, number: int, cache: Path) -> Iterator[Path]:
        """One file, on this machine for as long as it is needed."""
        uri = self.uris[number]
        path = fetch(uri, storage=self.job.spec.storage, cache=cache, kind="dataset")
        try:
            yield path
        finally:
            if uri.startswith("s3://"):
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardMaker:
    """Turns the files of a source into shards below `tokens/KEY/` in storage. `folder`: scratch of this rank."""

    files: SourceFiles
    encoder: Encoder
    store: Store
    key: str
    folder: Path

    def make(self, number: int, beat: "Callable[[], None]") -> None:
        """Make the shards of one file, if they are not there yet.

        Raises:
            TrainerError: DataInvalid, naming the file and the row, for what cannot be read or trained on.
        """
        place = self.place(number)
        if self.store.entry(f"{place}/{MANIFEST}") is not None:
            return
        folder = self.folder / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        made: list[CommittedFile] = []
        rows: list[int] = []
        weights: list[NDArray[np.int64]] = []
        positions = 0
        for table in self._tables(number):
            path = folder / f"shard-{len(made):05d}" / f"shard-{len(made):05d}.arrow"
            write_indexed([table], path)
            shard = open_indexed(path)
            rows.append(len(shard))
            weights.append(shard.weights.copy())
            positions = max(positions, shard.positions)
            made.extend(upload(self.store, path.parent, place, rank=0))
            # The store may have left the file there.
            shutil.rmtree(path.parent, ignore_errors=True)
            beat()
        all_weights = None
        if made:
            (folder / "weights").mkdir(parents=True)
            np.save(folder / "weights" / WEIGHTS, np.concatenate(weights))
            (all_weights,) = upload(self.store, folder / "weights", place, rank=0)
        manifest = FileManifest(shards=tuple(made), rows=tuple(rows), positions=positions, weights=all_weights)
        self.store.put_bytes(f"{place}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        log.info("%s: %s samples in %s shards", self.files.names[number], sum(rows), len(rows))
        shutil.rmtree(folder, ignore_errors=True)

    def place(self, number: int) -> str:
        """Where the shards of a file are."""
        return f"{TOKENS}/{self.key}/{number:05d}"

    def _tables(self, number: int) -> Iterator[pa.Table]:
        """The tokens of a file, packed if the manifest says so, in tables of a shard each."""
        held: list[pa.Table] = []
        tokens = 0
        for table in self._tokens(number):
            held.append(table)
            tokens += len(table["input_ids"].combine_chunks().flatten())
            if tokens >= SHARD_TOKENS:
                yield self._whole(held)
                held, tokens = [], 0
        if held:
            yield self._whole(held)

    def _whole(self, tables: list[pa.Table]) -> pa.Table:
        table = pa.concat_tables(tables)
        data = self.files.job.spec.workload().data
        return pack(table, data.max_length) if data.packing else table

    def _tokens(self, number: int) -> Iterator[pa.Table]:
        model, source = self.files.job.spec.workload().model, self.files.source
        first = 0
        with self.files.local(number, self.folder / "source") as path:
            for rows in readers.read_pieces(path, columns_of(source), ROWS_PER_CALL):
                try:
                    check_rows(rows, source, model.task, model.num_labels)
                    yield from self._encoded(rows, first)
                except TrainerError as error:
                    where = f"{self.files.names[number]}, among the rows from {first} on: {error.message}"
                    raise TrainerError(error.failure_class, where, error.remedy) from error
                first += rows.num_rows

    def _encoded(self, rows: pa.Table, first: int) -> Iterator[pa.Table]:
        # Batches of a CSV file are as large as its bytes make them.
        for start in range(0, rows.num_rows, ROWS_PER_CALL):
            yield self.encoder.encode(rows.slice(start, ROWS_PER_CALL), first + start)


def open_shards(maker: ShardMaker, folder: Path, seed: int) -> ShardedDataset:
    """The shards of all files, which are made by now; their weights are brought to `folder`, one process of a node at a time.

    Raises:
        TrainerError: DataInvalid if there are no rows at all; Unknown if storage lost something meanwhile.
    """
    places = [maker.place(number) for number in range(len(maker.files.names))]
    manifests = in_parallel(lambda place: _manifest(maker.store, place, folder), places)
    shards = [
        Shard(place, file, rows)
        for place, manifest in zip(places, manifests, strict=True)
        for file, rows in zip(manifest.shards, manifest.rows, strict=True)
    ]
    if not shards:
        uri = maker.files.source.uri
        raise TrainerError(FailureClass.DATA_INVALID, f"{uri} holds no rows", f"check {TRAIN_FIELD}.uri")
    weights = [
        np.load(folder / place / WEIGHTS, mmap_mode="r")
        for place, manifest in zip(places, manifests, strict=True)
        if manifest.weights is not None
    ]
    positions = max(manifest.positions for manifest in manifests)
    return ShardedDataset(maker.store, shards, np.concatenate(weights), positions, folder / "shards", seed)


def _manifest(store: Store, place: str, folder: Path) -> FileManifest:
    """That of one file, with the file's weights in `folder`."""
    text = store.get_bytes(f"{place}/{MANIFEST}")
    try:
        manifest = FileManifest.model_validate_json(text) if text else None
    except ValidationError:
        manifest = None
    if manifest is not None:
        here = folder / place / WEIGHTS
        if manifest.weights is None or here.exists() or fetch_files(store, place, [manifest.weights], folder / place):
            return manifest
    store.delete([f"{place}/{MANIFEST}"])
    raise TrainerError(
        FailureClass.UNKNOWN,
        f"the tokens in {store.uri}/{place} are not whole",
        "start the run again: its tokens are made anew",
    )
