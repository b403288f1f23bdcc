"""What a bad row is told: its number, its value, and the field to change."""

import pyarrow as pa
import pytest

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import DatasetSource, DataSpec
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.formats import FORMATS, check_format, columns_of, eval_source
from dsft_trainer.data.readers import read_path
from dsft_trainer.errors import TrainerError
from tests.trainer import tiny


def source(data_format, **fields) -> DatasetSource:
    return DatasetSource.model_validate({"uri": "file:///data", "format": data_format, **fields})


def data_spec(data_format, **fields) -> DataSpec:
    return DataSpec.model_validate({"train": {"uri": "file:///data", "format": data_format}, **fields})


@pytest.mark.parametrize("data_format", FORMATS)
def test_good_rows_pass(data_format, tmp_path):
    table = read_path(tiny.dataset(tmp_path, data_format, 20), columns_of(source(data_format)))
    check_rows(table, source(data_format), FORMATS[data_format].task, num_labels=None)


def test_dictionary_columns_are_read_as_their_values():
    table = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode(), "label": [0, 1, 1]})
    check_rows(table, source("classification"), "sequence-classification", 2)


def said(*messages) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in messages]


GOOD = said(("user", "hi"), ("assistant", "ho"))
BAD_ROWS = {
    "null text": (
        "classification",
        {"text": ["a", None, None], "label": [0, 1, 0]},
        r"row 1: column words is empty \(and 1",
    ),
    "text of numbers": (
        "classification",
        {"text": [1, 2], "label": [0, 1]},
        r"words holds int64, not text",
    ),
    "labels of text": (
        "classification",
        {"text": ["a"], "label": ["good"]},
        r"label holds string, not integers",
    ),
    "labels of floats": ("classification", {"text": ["a"], "label": [1.0]}, "label holds double, not integers"),
    "label too large": (
        "classification",
        {"text": ["a", "b", "c"], "label": [0, 3, 3]},
        r"row 1: label 3 is outside 0\.\.2 \(and 1 more rows\) .*numLabels from 3",
    ),
    "label below 0": ("classification", {"text": ["a"], "label": [-1]}, r"row 0: label -1 is outside 0\.\.2"),
    "messages of text": ("messages", {"messages": ["hi"]}, "messages holds string, not a list of {role, content}"),
    "other keys": ("messages", {"messages": [[{"from": "human", "value": "hi"}]]}, "have no role of type string"),
    "content of parts": (
        "messages",
        {"messages": [[{"role": "user", "content": [{"type": "text"}]}]]},
        "have no content of type string",
    ),
    "unknown role": ("messages", {"messages": [GOOD, said(("human", "hi"))]}, "row 1 has a role other than .*'human'"),
    "no content": (
        "messages",
        {"messages": [GOOD, said(("assistant", None), ("user", "x"))]},
        "row 1 has a message without",
    ),
    "no assistant": ("messages", {"messages": [GOOD, GOOD, said(("user", "hi"))]}, "row 2: messages has no assistant"),
    "no messages": ("messages", {"messages": [GOOD, []]}, "row 1: messages has no assistant"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case):
    data_format, rows, message = BAD_ROWS[case]
    columns = {"text": "words"} if data_format == "classification" else {}
    with pytest.raises(TrainerError, match=message) as caught:
        check_rows(pa.table(rows), source(data_format, columns=columns), FORMATS[data_format].task, num_labels=3)
    assert caught.value.failure_class is FailureClass.DATA_INVALID


def test_rows_are_counted_over_chunks():
    parts = [pa.table({"messages": [GOOD, GOOD]}), pa.table({"messages": [GOOD, said(("user", "hi"))]})]
    with pytest.raises(TrainerError, match="row 3: messages has no assistant"):
        check_rows(pa.concat_tables(parts), source("messages"), "causal-lm", None)


@pytest.mark.parametrize(
    ("train", "task", "data", "message"),
    [
        (source("text"), "sequence-classification", {}, "format text does not fit .*use classification or pair"),
        (source("pair"), "causal-lm", {}, "format pair does not fit .*use text or prompt_completion or messages"),
        (source("pair"), "sequence-classification", {"lossOn": "all"}, "lossOn all does not fit .*remove it"),
        (source("text"), "causal-lm", {"lossOn": "assistant"}, r"lossOn assistant does not fit .*\(use all\)"),
        (source("text", columns={"prompt": "q"}), "causal-lm", {}, r"columns\.prompt is set, but format text does not"),
    ],
)
def test_settings_that_do_not_fit_are_refused(train, task, data, message):
    with pytest.raises(TrainerError, match=message) as caught:
        check_format(train, task, data_spec(train.format, **data))
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID


def test_evaluation_takes_what_it_leaves_out_from_training():
    train = {
        "uri": "hf://nyu-mll/glue",
        "revision": "abc",
        "subset": "mrpc",
        "format": "pair",
        "columns": {"text": "s1"},
    }
    whole = DataSpec.model_validate({"train": train, "eval": {"split": "validation"}})
    assert eval_source(whole) == DatasetSource.model_validate({**train, "split": "validation"})
    other = DataSpec.model_validate({"train": train, "eval": {"uri": "file:///test.csv"}})
    assert eval_source(other) == DatasetSource.model_validate(
        {"uri": "file:///test.csv", "format": "pair", "columns": {"text": "s1"}}
    )
    assert eval_source(DataSpec.model_validate({"train": train})) is None
