"""From the manifest's data to indexed Arrow files that every rank of a node maps into memory.

One rank per node tokenises (or takes what Ray Data tokenised); the order of rows is the source's on every node, so the
sampler's indices mean the same everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from dsft_api.job import Job
from dsft_api.spec import Workload
from dsft_api.spec.identity import DatasetSource
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.formats import EVAL_FIELD, check_format, eval_source
from dsft_trainer.data.indexed import IndexedDataset, open_indexed, write_indexed
from dsft_trainer.data.sampler import GlobalBatches, Member, split_eval
from dsft_trainer.data.sharded import ShardedDataset
from dsft_trainer.data.sources import load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsft_trainer.data.tokens import Encoder

T = TypeVar("T")

TRAIN_FILE = "train.arrow"
EVAL_FILE = "eval.arrow"


@dataclass(frozen=True)
class Rows:
    """One raw data set, before tokenising, and where the manifest speaks of it."""

    table: pa.Table
    source: DatasetSource
    field: str


@dataclass(frozen=True)
class Prepared:
    """The tokenised data of a run."""

    train: IndexedDataset | ShardedDataset
    eval: IndexedDataset | None

    @property
    def positions(self) -> int:
        """Tokens of the longest row: in a packed sequence each begins anew."""
        return max(part.positions for part in (self.train, self.eval) if part is not None)

    def batches(self, work: Workload) -> GlobalBatches:
        """The training data in global batches; raises what `global_batches` does."""
        if isinstance(self.train, ShardedDataset):
            order = self.train.order
            return replace(global_batches(work, [order.n]), shards=order)
        batches = global_batches(work, self.train.parts)
        return replace(batches, lengths=self.train.lengths) if work.data.group_by_length else batches


def global_batches(work: Workload, parts: Sequence[int]) -> GlobalBatches:
    """Batches over the rows, or packed sequences, of each training data set, not grouped by length yet.

    Raises:
        TrainerError: DataInvalid if there is less than one batch, or nothing to draw from a member of a mixture.
    """
    mixture = work.data.mixture or ()
    members = tuple(Member(rows, member.weight) for rows, member in zip(parts, mixture, strict=bool(mixture)))
    unit = "packed sequences" if work.data.packing else "rows"
    return GlobalBatches(sum(parts), work.training.global_batch_size, work.training.seed, members, unit)


def load(job: Job, cache: Path) -> dict[str, Rows]:
    """Read and check the rows of `train` and, if there is one, `eval`; of a mixture `train-0`, `train-1` and so on.

    Needs neither torch nor transformers: the driver does it before anything is started.
    """
    work = job.spec.workload()
    parts = [_read(job, source, cache, field) for field, source in work.data.sources()]
    if work.data.eval is not None:
        return numbered("train", parts) | load_eval(job, cache)
    if work.data.eval_fraction is not None:
        halves = [split_eval(part.table, work.data.eval_fraction, work.training.seed, part.field) for part in parts]
        kept, evaluated = (
            [replace(part, table=table) for part, table in zip(parts, tables, strict=True)]
            for tables in zip(*halves, strict=True)
        )
        return numbered("train", kept) | numbered("eval", evaluated)
    return numbered("train", parts)


def load_eval(job: Job, cache: Path) -> dict[str, Rows]:
    """`eval` alone, as `load` gives it; nothing if it has no source of its own."""
    source = eval_source(job.spec.workload().data)
    return {"eval": _read(job, source, cache, EVAL_FIELD)} if source is not None else {}


def _read(job: Job, source: DatasetSource, cache: Path, field: str) -> Rows:
    work = job.spec.workload()
    check_format(source, work.model.task, work.data, field)
    table = load_rows(source, storage=job.spec.storage, cache=cache, field=field)
    check_rows(table, source, work.model.task, work.model.num_labels, field)
    return Rows(table, source, field)


def numbered(kind: str, parts: Sequence[T]) -> dict[str, T]:
    """Parts by the names that `load` gives them."""
    return {kind: parts[0]} if len(parts) == 1 else {f"{kind}-{number}": part for number, part in enumerate(parts)}


def parts_of(kind: str, named: Mapping[str, T]) -> list[T]:
    """Those of `load` that are `train`, or `eval`, in the order of the manifest."""
    return [part for name, part in named.items() if name.partition("-")[0] == kind]


def encoders(job: Job, rows: Mapping[str, Rows], tokenizer: "PreTrainedTokenizerBase") -> dict[str, "Encoder"]:
    """How each data set becomes tokens. The tokenizer has its chat template by now."""
    from dsft_trainer.data.tokens import Encoder

    data = job.spec.workload().data
    return {name: Encoder.of(part.source, data, tokenizer, part.field) for name, part in rows.items()}


def write_tokens(job: Job, tables: Mapping[str, pa.Table], folder: Path) -> Path:
    """Write tokenised tables where `open_prepared` finds them, the training data packed if the manifest says so."""
    from dsft_trainer.data.packing import pack

    data = job.spec.workload().data
    folder.mkdir(parents=True, exist_ok=True)
    train = parts_of("train", tables)
    if train:
        # Each by itself, so that a sequence is of one member of a mixture.
        write_indexed([pack(table, data.max_length) for table in train] if data.packing else train, folder / TRAIN_FILE)
    if held_out := parts_of("eval", tables):
        write_indexed(held_out, folder / EVAL_FILE)
    return folder


def open_prepared(folder: Path) -> Prepared:
    """Map what `write_tokens` wrote."""
    held_out = folder / EVAL_FILE
    return Prepared(open_indexed(folder / TRAIN_FILE), open_indexed(held_out) if held_out.exists() else None)


def tokenize_here(
    job: Job, tokenizer: "PreTrainedTokenizerBase", folder: Path, load: Callable[[Job, Path], dict[str, Rows]] = load
) -> Path:
    """Loader torch: read and tokenise in this process."""
    from dsft_trainer.data.tokens import tokenize

    rows = load(job, folder / "source")
    made = encoders(job, rows, tokenizer)
    return write_tokens(job, {name: tokenize(part.table, made[name]) for name, part in rows.items()}, folder)
