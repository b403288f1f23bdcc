"""From the manifest's data to indexed Arrow files that every rank of a node maps into memory.

One rank per node tokenises (or takes what Ray Data tokenised); the order of rows is the source's on every node, so the
sampler's indices mean the same everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from dsft_api.job import Job
from dsft_api.spec.identity import DatasetSource
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.formats import EVAL_FIELD, TRAIN_FIELD, check_format, eval_source
from dsft_trainer.data.indexed import IndexedDataset, open_indexed, write_indexed
from dsft_trainer.data.sampler import split_eval
from dsft_trainer.data.sources import load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsft_trainer.data.tokens import Encoder


@dataclass(frozen=True)
class Rows:
    """One raw data set, before tokenising, and where the manifest speaks of it."""

    table: pa.Table
    source: DatasetSource
    field: str


@dataclass(frozen=True)
class Prepared:
    """The tokenised data of a run."""

    train: IndexedDataset
    eval: IndexedDataset | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(int(part.lengths.max()) for part in (self.train, self.eval) if part is not None)


def load(job: Job, cache: Path) -> dict[str, Rows]:
    """Read and check the rows of `train` and, if there is one, `eval`.

    Needs neither torch nor transformers: the driver does it before anything is started.
    """
    spec, work = job.spec, job.spec.workload()

    def read(source: DatasetSource, field: str) -> Rows:
        check_format(source, work.model.task, work.data, field)
        table = load_rows(source, storage=spec.storage, cache=cache, field=field)
        check_rows(table, source, work.model.task, work.model.num_labels, field)
        return Rows(table, source, field)

    train = read(work.train, TRAIN_FIELD)
    held_out = eval_source(work.data)
    if held_out is not None:
        return {"train": train, "eval": read(held_out, EVAL_FIELD)}
    if work.data.eval_fraction is not None:
        kept, evaluated = split_eval(train.table, work.data.eval_fraction, work.training.seed)
        return {"train": Rows(kept, work.train, TRAIN_FIELD), "eval": Rows(evaluated, work.train, TRAIN_FIELD)}
    return {"train": train}


def encoders(job: Job, rows: Mapping[str, Rows], tokenizer: "PreTrainedTokenizerBase") -> dict[str, "Encoder"]:
    """How each data set becomes tokens. The tokenizer has its chat template by now."""
    from dsft_trainer.data.tokens import Encoder

    data = job.spec.workload().data
    return {name: Encoder.of(part.source, data, tokenizer, part.field) for name, part in rows.items()}


def write_tokens(tables: Mapping[str, pa.Table], folder: Path) -> Path:
    """Write tokenised tables where `open_prepared` finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_indexed(table, folder / f"{name}.arrow")
    return folder


def open_prepared(folder: Path) -> Prepared:
    """Map what `write_tokens` wrote."""
    held_out = folder / "eval.arrow"
    return Prepared(open_indexed(folder / "train.arrow"), open_indexed(held_out) if held_out.exists() else None)


def tokenize_here(job: Job, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> Path:
    """Loader torch: read and tokenise in this process."""
    from dsft_trainer.data.tokens import tokenize

    rows = load(job, folder / "source")
    made = encoders(job, rows, tokenizer)
    return write_tokens({name: tokenize(part.table, made[name]) for name, part in rows.items()}, folder)
