"""Is every row what its format promises? Vectorised over Arrow, so cheap enough for the driver's preflight.

Each error names the first bad row (counted from 0), its value, how many rows are like it, and the field to change.
"""

import pyarrow as pa
import pyarrow.compute as pc

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import DatasetSource, Task
from dsft_trainer.data.formats import TRAIN_FIELD, Column, columns_of
from dsft_trainer.errors import TrainerError

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_rows(
    table: pa.Table, source: DatasetSource, task: Task, num_labels: int | None, field: str = TRAIN_FIELD
) -> None:
    """Check the rows that `load_rows` returned. `num_labels` defaults to 2, as in the manifest.

    Raises:
        TrainerError: DataInvalid for nulls, text that is not text, labels outside 0..numLabels-1, and conversations
            without the shape [{role, content}], with an unknown role, or without an assistant to learn from. It names the
            field, where that is not the one training data set.
    """
    try:
        _check_columns(table, source, task, num_labels, field)
    except TrainerError as error:
        if field == TRAIN_FIELD:
            raise
        raise TrainerError(error.failure_class, f"{field}: {error.message}", error.remedy) from error


def _check_columns(table: pa.Table, source: DatasetSource, task: Task, num_labels: int | None, field: str) -> None:
    for column in columns_of(source, field):
        cells = table[column.name]
        if pa.types.is_dictionary(cells.type):
            cells = cells.cast(cells.type.value_type)
        _check_present(cells, column)
        if column.kind == "text":
            _check_text(cells, column)
        elif column.kind == "messages":
            _check_messages(cells, column)
        elif task == "sequence-classification":
            _check_labels(cells, column, num_labels or 2)


def _check_present(cells: pa.ChunkedArray, column: Column) -> None:
    _refuse(pc.is_null(cells), f"column {column.source_name} is empty", "fill or drop the row")


def _check_text(cells: pa.ChunkedArray, column: Column) -> None:
    if not _is_string(cells.type):
        raise _invalid(
            f"column {column.source_name} holds {cells.type}, not text",
            f"name a column of strings in {column.field}",
        )


def _check_labels(cells: pa.ChunkedArray, column: Column, num_labels: int) -> None:
    if not pa.types.is_integer(cells.type):
        raise _invalid(
            f"column {column.source_name} holds {cells.type}, not integers",
            f"number the classes from 0, or name another column in {column.field}",
        )
    outside = pc.or_(pc.less(cells, 0), pc.greater_equal(cells, num_labels))
    bad = _first(outside)
    if bad is not None:
        raise _invalid(
            f"row {bad}: {column.source_name} {cells[bad].as_py()} is outside 0..{num_labels - 1}{_others(outside)}",
            f"number the classes from 0, or raise spec.model.numLabels from {num_labels}",
        )


def _check_messages(cells: pa.ChunkedArray, column: Column) -> None:
    shape = cells.type
    is_list = pa.types.is_list(shape) or pa.types.is_large_list(shape)
    message = shape.value_type if is_list else None
    if message is None or not pa.types.is_struct(message):
        raise _invalid(
            f"column {column.source_name} holds {shape}, not a list of {{role, content}}",
            f"name a column of conversations in {column.field}",
        )
    for key in ("role", "content"):
        if message.get_field_index(key) < 0 or not _is_string(message.field(key).type):
            raise _invalid(
                f"the messages of column {column.source_name} have no {key} of type string, but {message}",
                "write each message as {role, content}, both strings",
            )
    rows = pc.list_parent_indices(cells)
    messages = pc.list_flatten(cells)
    roles = pc.struct_field(messages, "role")
    _refuse_message(rows, pc.is_null(pc.struct_field(messages, "content")), "a message without content")
    known = pc.is_in(roles, value_set=pa.array(ROLES).cast(roles.type))
    _refuse_message(rows, pc.invert(known), f"a role other than {', '.join(ROLES)}", roles)
    learnt = pc.unique(rows.filter(pc.equal(roles, "assistant")))
    silent = pc.invert(pc.is_in(pa.array(range(len(cells)), pa.int64()), value_set=learnt.cast(pa.int64())))
    _refuse(silent, f"{column.source_name} has no assistant message to learn from", "drop the row")


def _refuse_message(
    rows: pa.ChunkedArray, bad: pa.ChunkedArray, what: str, shown: pa.ChunkedArray | None = None
) -> None:
    first = _first(bad)
    if first is not None:
        value = f": {shown[first].as_py()!r}" if shown is not None else ""
        raise _invalid(f"row {rows[first].as_py()} has {what}{value}", "correct or drop the row")


def _refuse(bad: pa.ChunkedArray | pa.BooleanArray, what: str, remedy: str) -> None:
    first = _first(bad)
    if first is not None:
        raise _invalid(f"row {first}: {what}{_others(bad)}", remedy)


def _first(bad: pa.ChunkedArray | pa.BooleanArray) -> int | None:
    index = pc.index(bad, value=True).as_py()
    return None if index < 0 else index


def _others(bad: pa.ChunkedArray | pa.BooleanArray) -> str:
    count = pc.sum(bad).as_py() - 1
    return f" (and {count} more rows)" if count else ""


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _invalid(message: str, remedy: str) -> TrainerError:
    return TrainerError(FailureClass.DATA_INVALID, message, remedy)
