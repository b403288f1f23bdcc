"""What each data format reads, what it trains, and where its columns are. Pure.

A format decides everything else about a row: its columns, the task it belongs to and the tokens that may be trained.
"""

from dataclasses import dataclass

from pydantic.alias_generators import to_camel

from dsft_api.conditions import FailureClass
from dsft_api.formats import FORMATS, ColumnKind, LossOn
from dsft_api.spec.identity import Columns, DatasetSource, DataSpec, Task
from dsft_trainer.errors import TrainerError

TRAIN_FIELD = "spec.data.train"
EVAL_FIELD = "spec.data.eval"


@dataclass(frozen=True)
class Column:
    """A column that a format reads: `name` in our tables, `source_name` in the user's data, set by `field`."""

    name: str
    source_name: str
    kind: ColumnKind
    field: str


def columns_of(source: DatasetSource, field: str = TRAIN_FIELD) -> tuple[Column, ...]:
    """The columns that the source's format reads, in order. `field` is where the source stands in the manifest."""
    return tuple(
        Column(
            name=name,
            source_name=getattr(source.columns, name) or to_camel(name),
            kind=kind,
            field=f"{field}.columns.{to_camel(name)}",
        )
        for name, kind in FORMATS[source.format].columns
    )


def loss_on(source: DatasetSource, data: DataSpec) -> LossOn | None:
    """The tokens that are trained on; None for classification."""
    allowed = FORMATS[source.format].loss_on
    return data.loss_on or (allowed[0] if allowed else None)


def eval_source(data: DataSpec) -> DatasetSource | None:
    """The held-out data set, with what `data.eval` leaves out taken from `data.train`; None if there is no such field.

    Revision, subset and split belong to a URI: a URI of its own takes none of them from the training data. A mixture has
    nothing to take.
    """
    if data.eval is None:
        return None
    own_place = {"revision", "subset", "split"} if data.eval.uri else set[str]()
    inherited = data.train.model_dump(exclude=own_place) if data.train else {}
    return DatasetSource(**{**inherited, **data.eval.model_dump(exclude_none=True)})


def check_format(source: DatasetSource, task: Task, data: DataSpec, field: str = TRAIN_FIELD) -> None:
    """Refuse a format that does not fit the task, and settings that the format would ignore.

    Raises:
        TrainerError: ConfigInvalid, naming the field.
    """
    chosen = FORMATS[source.format]
    if chosen.task != task:
        fitting = " or ".join(name for name, form in FORMATS.items() if form.task == task)
        raise _invalid(f"{field}.format {source.format} does not fit spec.model.task {task}", f"use {fitting}")
    if data.loss_on is not None and data.loss_on not in chosen.loss_on:
        allowed = " or ".join(chosen.loss_on)
        raise _invalid(
            f"spec.data.lossOn {data.loss_on} does not fit {field}.format {source.format}",
            f"use {allowed}" if allowed else "remove it: classification trains on the label",
        )
    read = {name for name, _ in chosen.columns}
    for name in Columns.model_fields:
        if getattr(source.columns, name) is not None and name not in read:
            raise _invalid(
                f"{field}.columns.{to_camel(name)} is set, but format {source.format} does not read it", "remove it"
            )


def _invalid(message: str, remedy: str) -> TrainerError:
    return TrainerError(FailureClass.CONFIG_INVALID, message, remedy)
