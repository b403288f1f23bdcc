"""What each check of the preflight looks at, without a GPU, without Ray, and without fetching weights.

A check raises what would end the run, notes what cannot be told from here, and leaves what it found for the next ones.
"""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.quantity import quantity
from dsft_api.spec.identity import DatasetSource
from dsft_api.status import Inputs
from dsft_trainer import pins, program
from dsft_trainer.checkpoint.store import check_writable, store_of
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.first_rows import bytes_of, first_rows
from dsft_trainer.data.formats import EVAL_FIELD, check_format, eval_source
from dsft_trainer.data.prepare import Rows, encoders, numbered, parts_of
from dsft_trainer.data.sources import check_model_files, fetch, hub_error, s3_objects
from dsft_trainer.errors import TrainerError
from dsft_trainer.preflight import check_numbers
from dsft_trainer.program_source import use_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Docker's default for a container, with which NCCL and Ray fail at once.
SHM_BYTES_PER_RANK = 64 * 1024 * 1024
SHM_BYTES_AT_MOST = 1024 * 1024 * 1024
_MODEL = "the model"
SAMPLE_ROWS = 16
SAMPLE_CHARACTERS = 4000
SHM = Path("/dev/shm")  # noqa: S108


@dataclass
class Look:
    """The job, and what the checks leave for one another. `here`: the ranks will run on this machine."""

    job: Job
    cache: Path
    here: bool = False
    unchecked: list[str] = field(default_factory=list[str])
    tokenizer_folder: Path | None = None
    rows: dict[str, Rows] = field(default_factory=dict[str, Rows])
    to_fetch: dict[str, int] = field(default_factory=dict[str, int])
    sample: str = ""
    field: str | None = None
    """Where in the spec the check has come to, where it is about more than one place."""


def storage(look: Look) -> None:
    """Put, get, list and delete below the run's folder, with the run's own identity. Silence and 503 may pass by themselves."""
    check_writable(store_of(look.job).impatient(), worked_before=True)


def numbers(look: Look) -> None:
    """Batch sizes against ranks, precision against the device."""
    if look.job.spec.program is None:
        check_numbers(look.job)


def program_module(look: Look) -> None:
    """The program's archive is what was pinned, and its modules are there or in the image."""
    if look.job.spec.program is not None:
        use_source(look.job)
        program.check_modules(look.job.spec.program)


def start_from(look: Look) -> None:
    """The other run and its checkpoint are there."""
    pins.starting_point(look.job, look.job.resolved or Inputs())


def model(look: Look) -> None:
    """Config and tokenizer are fetched, which a gated model refuses; weights are listed."""
    if look.job.spec.program is not None:
        return
    spec, where = look.job.spec.workload().model, look.job.spec.storage
    if spec.uri.startswith("hf://"):
        info = _hub_info(spec.uri, spec.revision, "model")
        if info is None:
            look.unchecked.append(f"spec.model.uri: the Hub cannot be asked about {spec.uri} from here")
            return
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        check_model_files(spec.uri, sizes)
    elif spec.uri.startswith("s3://"):
        _, entries = s3_objects(spec.uri, where, "model")
        sizes = {entry.key: entry.size for entry in entries}
        check_model_files(spec.uri, sizes)
    else:
        sizes = {}
        fetch(spec.uri, storage=where, cache=look.cache, kind="model", revision=spec.revision)
    look.to_fetch[_MODEL] = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    if spec.trust_remote_code:
        look.unchecked.append(
            "spec.model.trustRemoteCode: the model's own code is not run here; the ranks check config and tokenizer"
        )
        return
    folder = fetch(spec.uri, storage=where, cache=look.cache / "model", kind="tokenizer", revision=spec.revision)
    _check_config(spec.uri, folder)
    look.tokenizer_folder = folder


def _hub_info(uri: str, revision: str | None, kind: Literal["model", "dataset"]) -> Any:
    """What the Hub tells of a repository; None if it is out of reach, which is no failure: a node may have it in its cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().repo_info(
            uri.removeprefix(pins.HUB),
            repo_type=kind,
            revision=revision,
            files_metadata=kind == "model",
            timeout=pins.HUB_SECONDS,
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
        raise hub_error(uri, kind, error) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        log.warning("%s: the Hub cannot be asked: %s", uri, error)
        return None


def _check_config(uri: str, folder: Path) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED,
            f"config.json of {uri} is of no model that can be loaded here: {str(error).splitlines()[0]}",
            "name a model of an architecture that transformers has, saved with save_pretrained",
        ) from error


def train_data(look: Look) -> None:
    """Each training data set can be reached; its first rows have the columns, and labels in their range."""
    if look.job.spec.program is None:
        for name, (field, source) in numbered("train", list(look.job.spec.workload().data.sources())).items():
            _read(look, name, source, field)


def eval_data(look: Look) -> None:
    """The same of evaluation data with a source of its own."""
    if look.job.spec.program is not None:
        return
    source = eval_source(look.job.spec.workload().data)
    if source is not None:
        _read(look, "eval", source, EVAL_FIELD)


def _read(look: Look, name: str, source: DatasetSource, field: str) -> None:
    work, where = look.job.spec.workload(), look.job.spec.storage
    look.field = field
    check_format(source, work.model.task, work.data, field)
    if source.uri.startswith("hf://") and _hub_info(source.uri, source.revision, "dataset") is None:
        look.unchecked.append(f"{field}.uri: the Hub cannot be asked about {source.uri} from here")
        return
    table = first_rows(source, storage=where, cache=look.cache / name, field=field)
    if table is None:
        look.unchecked.append(f"{field}.uri: {source.uri} is too large to look into; the ranks check every row")
        return
    check_rows(table, source, work.model.task, work.model.num_labels, field)
    look.rows[name] = Rows(table, source, field)
    # Each rank of a node fetches a file of its own.
    ranks = max((pool.gpus_per_node for pool in look.job.spec.node_pools), default=1) or 1
    is_streamed = work.data.streaming and field != EVAL_FIELD
    look.to_fetch[f"data.{name}"] = bytes_of(source, where, at_once=ranks if is_streamed else None)


def sample(look: Look) -> None:
    """The first rows as tokens, of which some are trained: a chat template is rendered here for the first time."""
    if look.tokenizer_folder is None or not parts_of("train", look.rows):
        return
    from dsft_trainer.data.tokens import set_chat_template
    from dsft_trainer.model import load_tokenizer

    tokenizer = load_tokenizer(look.tokenizer_folder)
    set_chat_template(tokenizer, look.job, look.cache / "template")
    for name, encoder in encoders(look.job, look.rows, tokenizer).items():
        tokens = encoder.encode(look.rows[name].table.slice(0, SAMPLE_ROWS))
        if not look.sample:
            look.sample = _shown({column: tokens[column][0].as_py() for column in tokens.column_names}, tokenizer)


def _shown(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> str:
    """A row as the model gets it: what is trained stands in [[ ]]."""
    ids, labels = row["input_ids"], row.get("labels")
    if labels is None:
        return f"{len(ids)} tokens, label {row['label']}: {tokenizer.decode(ids)}"[:SAMPLE_CHARACTERS]
    parts: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        is_trained = label == token
        if not parts or parts[-1][0] is not is_trained:
            parts.append((is_trained, []))
        parts[-1][1].append(token)
    texts = ((is_trained, tokenizer.decode(tokens)) for is_trained, tokens in parts)
    text = "".join(f"[[{part}]]" if is_trained else part for is_trained, part in texts)
    return f"{len(ids)} tokens, {row['weight']} trained: {text}"[:SAMPLE_CHARACTERS]


def disk(look: Look) -> None:
    """Scratch disks have room for what a node fetches. A lower bound: tokens and checkpoints come on top."""
    if look.here:
        folder = Path(os.environ.get("DSFT_SCRATCH", tempfile.gettempdir()))
        room, remedy = Decimal(shutil.disk_usage(folder).free), "free space there, or set DSFT_SCRATCH"
        _check_room(look, f"{folder} has", room, remedy, has_hub_cache=_has_hub_cache(folder))
        return
    moved = any(variable.name == "HF_HOME" for variable in look.job.spec.env)
    for index, pool in enumerate(look.job.spec.node_pools):
        if pool.scratch is not None:
            field = f"spec.nodePools[{index}].scratch.size"
            size = quantity(pool.scratch.size)
            is_here = pool.model_cache is None and not moved
            _check_room(look, f"{field} is", size, f"raise {field}", has_hub_cache=is_here)


def _has_hub_cache(folder: Path) -> bool:
    """Whether what comes from the Hub lies on the disk of a folder."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME)
    there = next(path for path in (home, *home.parents) if path.exists())
    return there.stat().st_dev == folder.stat().st_dev


def _check_room(look: Look, where: str, room: Decimal, remedy: str, *, has_hub_cache: bool) -> None:
    needs = dict(look.to_fetch)
    is_of_hub = look.job.spec.model is not None and look.job.spec.model.uri.startswith(pins.HUB)
    if is_of_hub and not has_hub_cache:
        needs.pop(_MODEL, None)
    needed = sum(needs.values())
    if room < needed:
        parts = " and ".join(f"{name} ({_mb(size)})" for name, size in needs.items() if size)
        raise TrainerError(FailureClass.CONFIG_INVALID, f"{where} {_mb(room)}, and {parts} need {_mb(needed)}", remedy)


def shared_memory(look: Look) -> None:
    """The memory that processes share is more than a container's default of 64 MiB: NCCL and Ray fail with that."""
    gpus = max((pool.gpus_per_node for pool in look.job.spec.node_pools), default=0)
    needed = min(SHM_BYTES_AT_MOST, SHM_BYTES_PER_RANK * (1 + gpus))
    there = shutil.disk_usage(SHM).total
    if there < needed:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"{SHM} has {_mb(there)}, and the ranks of a node need {_mb(needed)}",
            "raise the memory limit in spec.nodePools[].resources, which is also the size of /dev/shm",
        )


def _mb(size: int | Decimal) -> str:
    return f"{float(size) / 1e6:.1f} MB"
