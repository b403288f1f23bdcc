"""The data of a run, as tokens that its ranks read: from storage, or made here, once per node.

What is streamed is made by all ranks together, and stays in storage: a node fetches the shards that it needs next.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsft_api.job import Job
from dsft_trainer import collectives
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.data.formats import TRAIN_FIELD, check_format
from dsft_trainer.data.indexed import open_indexed
from dsft_trainer.data.prepare import EVAL_FILE, Prepared, load_eval, open_prepared, tokenize_here, write_tokens
from dsft_trainer.data.sharded import ShardedDataset
from dsft_trainer.data.shards import ShardMaker, SourceFiles, open_shards
from dsft_trainer.data.token_cache import TokenCache, discard, key_of
from dsft_trainer.data.tokens import Encoder, set_chat_template
from dsft_trainer.runtime import Runtime
from dsft_trainer.watchdog import Watchdog

# In place of a key, where it is not known what decides the tokens.
UNKNOWN = "unknown"


def prepare_data(
    job: Job,
    runtime: Runtime,
    store: Store,
    scratch: Path,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    watchdog: Watchdog,
) -> Prepared:
    """The tokens of training and evaluation. `model` is the folder that the tokenizer, which gets its chat template, is from.

    Collective.

    Raises:
        TrainerError: on all ranks, for what cannot be read, tokenised or trained on.
    """
    cache = scratch / f"template-{runtime.place.rank}"
    collectives.together(lambda: set_chat_template(tokenizer, job, cache))
    folder, key = scratch / "data", key_of(job, model, tokenizer)
    with watchdog.patient():
        if job.spec.workload().data.streaming:
            return _streamed(job, runtime, store, scratch, tokenizer, key, watchdog)

        def tokens() -> Path:
            tables = runtime.tokenized()
            return write_tokens(job, tables, folder) if tables else tokenize_here(job, tokenizer, folder)

        kept, place = TokenCache(store, key), runtime.place
        path = collectives.once_per_node(place, lambda: kept.tokens(folder, tokens, keeps=place.is_first))
    return open_prepared(path)


def _streamed(
    job: Job,
    runtime: Runtime,
    store: Store,
    scratch: Path,
    tokenizer: PreTrainedTokenizerBase,
    key: str | None,
    watchdog: Watchdog,
) -> Prepared:
    """Each rank makes the shards of every so many-th file; then each node has what tells where a row is."""
    work, place = job.spec.workload(), runtime.place
    ((_, source),) = work.data.sources()

    # Listed once, so that all ranks have the same files under the same numbers.
    listed = collectives.on_first(place.is_first, lambda: SourceFiles.of(job, source, scratch / "source").names)

    def make() -> ShardMaker:
        check_format(source, work.model.task, work.data, TRAIN_FIELD)
        files = SourceFiles.of(job, source, scratch / "source").only(listed)
        encoder = Encoder.of(source, work.data, tokenizer)
        maker = ShardMaker(files, encoder, store, key or UNKNOWN, scratch / f"shards-{place.rank}")
        for number in range(place.rank, len(files.names), place.world_size):
            maker.make(number, watchdog.beat)
        return maker

    # Without a key it is not known what the tokens there are of.
    collectives.on_first(place.is_first, lambda: discard(store, but=key))
    maker = collectives.together(make)

    def open_here() -> ShardedDataset:
        return open_shards(maker, scratch, work.training.seed)

    first = collectives.together(lambda: open_here() if place.is_first_on_node else None)
    train = collectives.together(lambda: first or open_here())
    folder = scratch / "data"
    path = collectives.once_per_node(place, lambda: tokenize_here(job, tokenizer, folder, load_eval))
    held_out = path / EVAL_FILE
    return Prepared(train, open_indexed(held_out) if held_out.exists() else None)
