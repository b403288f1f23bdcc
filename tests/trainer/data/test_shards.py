"""Data in shards is the data: the same rows as tokens, whatever the kind of file, and with little of it at hand."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.files import fetch
from dsft_trainer.checkpoint.store import Store, open_store, store_of
from dsft_trainer.data import sharded, shards
from dsft_trainer.data.formats import Column
from dsft_trainer.data.indexed import Row
from dsft_trainer.data.prepare import open_prepared, tokenize_here
from dsft_trainer.data.readers import read_path, read_pieces
from dsft_trainer.data.shards import ShardedDataset, ShardMaker, SourceFiles, open_shards
from dsft_trainer.data.tokens import Encoder
from dsft_trainer.errors import TrainerError
from tests.trainer import tiny
from tests.trainer.runs import causal_lm, first_attempt, wait_until

FILES = 5
ROWS = 30


def folder_of(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Files of six rows each."""
    path.mkdir(parents=True)
    for number in range(FILES):
        tiny.write_jsonl(path / f"part-{number}.jsonl", lines[number::FILES])
    return path


def job_on(folder: Path, **data: Any) -> Job:
    document = causal_lm("streamed", Path("/model"), Path("/text"), steps=1)["spec"]
    train = {"uri": folder.as_uri(), "format": "prompt_completion"}
    document["data"] = {"train": train, "maxLength": 64, "streaming": True, **data}
    job = first_attempt(document)
    return job.model_copy(update={"storage_prefix": (folder.parent / "run").as_uri()})


def maker_of(job: Job, folder: Path) -> ShardMaker:
    ((_, source),) = job.spec.workload().data.sources()
    encoder = Encoder.of(source, job.spec.workload().data, tiny.tokenizer())
    return ShardMaker(SourceFiles.of(job, source, folder), encoder, store_of(job), "key", folder)


def streamed(job: Job, folder: Path) -> ShardedDataset:
    maker = maker_of(job, folder / "making")
    for number in range(len(maker.files.names)):
        maker.make(number, lambda: None)
    return open_shards(maker, folder / "here", seed=1)


def as_lists(row: Row) -> dict[str, list[int]]:
    return {name: values.tolist() for name, values in row.items()}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three rows each."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 60)
    monkeypatch.setattr(shards, "ROWS_PER_CALL", 2)


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    return tiny.rows("prompt_completion", ROWS)


@pytest.fixture
def job(tmp_path: Path, lines: list[dict[str, Any]]) -> Job:
    return job_on(folder_of(tmp_path / "data", lines))


def test_shards_hold_the_rows_of_all_files_in_their_order(job: Job, tmp_path: Path) -> None:
    data = streamed(job, tmp_path)
    whole = open_prepared(tokenize_here(job, tiny.tokenizer(), tmp_path / "whole")).train
    assert len(data.order.rows) == 2 * FILES
    assert [as_lists(data[row]) for row in range(len(data))] == [as_lists(whole[row]) for row in range(ROWS)]
    assert data.weights.tolist() == whole.weights.tolist()
    assert data.positions == whole.positions


def test_files_and_shards_may_be_on_s3(job: Job, tmp_path: Path, s3_uri: str) -> None:
    local = streamed(job, tmp_path)
    folder = open_store(f"{s3_uri}/data")
    for file in (tmp_path / "data").iterdir():
        folder.put_bytes(file.name, file.read_bytes())
    folder.put_bytes("_SUCCESS", b"")
    ((_, source),) = job.spec.workload().data.sources()
    there = job.spec.workload().data.model_copy(update={"train": source.model_copy(update={"uri": folder.uri})})
    spec = job.spec.model_copy(update={"data": there})
    data = streamed(job.model_copy(update={"spec": spec, "storage_prefix": f"{s3_uri}/run"}), tmp_path / "s3")
    assert [as_lists(data[row]) for row in range(len(data))] == [as_lists(local[row]) for row in range(ROWS)]
    # No file of the data is kept.
    assert not list((tmp_path / "s3").rglob("*.jsonl"))


def test_shards_are_packed_each_by_itself(job: Job, tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    rows = streamed(job, tmp_path)
    packed = streamed(job_on(folder_of(tmp_path / "again" / "data", lines), packing=True), tmp_path / "again")
    assert 0 < len(packed) < len(rows)
    assert packed.weights.sum() == rows.weights.sum()
    assert all(packed[row]["position_ids"][0] == 0 for row in range(len(packed)))


def test_what_is_wanted_is_here_and_nothing_else(job: Job, tmp_path: Path) -> None:
    data = streamed(job, tmp_path)
    last = len(data.order.rows) - 1
    for wanted in ([0, 1, 2], [1, last], [last]):
        data.want(wanted)
        for shard in wanted:
            assert len(data[sum(data.order.rows[:shard])]["input_ids"]) > 0
        wait_until(lambda: shards_in(tmp_path / "here" / "shards") == set(wanted), f"shards {wanted} alone")  # noqa: B023
    data.close()


def shards_in(folder: Path) -> set[int]:
    return {int(path.parent.name) for path in folder.glob("[0-9]*/*.arrow") if path.parent.suffix != ".part"}


def test_a_restart_makes_only_what_is_not_there(job: Job, tmp_path: Path) -> None:
    maker = maker_of(job, tmp_path / "making")
    maker.make(3, lambda: None)
    store = store_of(job)
    before = {entry.key: entry.etag for entry in store.list("tokens")}
    data = streamed(job, tmp_path)
    assert len(data) == ROWS
    after = {entry.key: entry.etag for entry in store.list("tokens")}
    assert before.items() <= after.items()
    assert len(after) > len(before)


def test_a_damaged_shard_is_told_and_made_anew(job: Job, tmp_path: Path) -> None:
    data = streamed(job, tmp_path)
    store = store_of(job)
    damaged = next(entry.key for entry in store.list("tokens") if entry.key.endswith("shard-00001.arrow"))
    whole = store.get_bytes(damaged)
    assert whole
    store.put_bytes(damaged, whole[:-1] + b"!")
    shard = data.order.rows[0]
    with pytest.raises(TrainerError, match=r"shard-00001\.arrow is missing or damaged"):
        data[shard]
    again = streamed(job, tmp_path / "again")
    assert len(again[shard]["input_ids"]) > 0


def test_storage_that_was_away_while_a_shard_was_fetched_ahead_is_asked_again(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = streamed(job, tmp_path)
    asked: list[str] = []

    def away_at_first(store: Store, key: str, files: Sequence[CommittedFile], folder: Path) -> bool:
        asked.append(key)
        if len(asked) == 1:
            raise TrainerError(FailureClass.UNKNOWN, "the storage does not answer")
        return fetch(store, key, files, folder)

    monkeypatch.setattr(sharded, "fetch", away_at_first)
    data.want([1])
    assert len(data[data.order.rows[0]]["input_ids"]) > 0
    assert len(asked) == 2
    data.close()


def test_errors_name_the_file_and_the_row(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    folder = folder_of(tmp_path / "data", lines)
    tiny.write_jsonl(folder / "part-2.jsonl", [*lines[:3], {"prompt": "a", "completion": None}])
    with pytest.raises(
        TrainerError, match=r"part-2\.jsonl, among the rows from 2 on: row 1: column completion is empty"
    ):
        streamed(job_on(folder), tmp_path)


def test_no_rows_at_all_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="holds no rows"):
        streamed(job_on(folder_of(tmp_path / "data", [])), tmp_path)


def as_csv(table: pa.Table, path: Path) -> None:
    csv.write_csv(table, path)


def as_parquet(table: pa.Table, path: Path) -> None:
    parquet.write_table(table, path, row_group_size=7)


def as_jsonl(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


@pytest.mark.parametrize(
    ("suffix", "write"), [("csv", as_csv), ("parquet", as_parquet), ("jsonl", as_jsonl), ("json", as_jsonl)]
)
def test_pieces_are_the_file(suffix: str, write: Callable[[pa.Table, Path], None], tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    rows = 20
    write(pa.table({"x": np.arange(rows), "text": [f'row {n}\n, "{n}"' for n in range(rows)]}), path)
    columns = [Column(name="text", source_name="text", kind="text", field="spec.data.train.columns.text")]
    pieces = list(read_pieces(path, columns, 6))
    assert pa.concat_tables(pieces).to_pylist() == read_path(path, columns).to_pylist()
    if suffix != "csv":
        assert [piece.num_rows for piece in pieces] == [6, 6, 6, 2]


def test_columns_that_nobody_reads_may_change_their_type_anywhere_in_a_large_csv(tmp_path: Path) -> None:
    """Arrow infers types from the first block of a file, 1 MiB."""
    path, rows = tmp_path / "data.csv", 60_000
    path.write_text(
        "id,text\n" + "".join(f"{n if n < rows - 1 else 'last'},row number {n} of it\n" for n in range(rows))
    )
    assert path.stat().st_size > 2**20
    columns = [Column(name="text", source_name="text", kind="text", field="spec.data.train.columns.text")]
    whole = read_path(path, columns)
    assert whole.num_rows == rows
    assert pa.concat_tables(read_pieces(path, columns, 1000)).equals(whole.combine_chunks())


def test_a_file_of_no_data_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("a")
    with pytest.raises(TrainerError, match="names no data format"):
        list(read_pieces(tmp_path / "data.txt", [], 6))
