"""URIs of models and data sets -> local paths and rows.

Four schemes: hf:// (the Hub), s3://, file:// and python://PACKAGE/PATH, a file or folder inside an installed package.
Heavy libraries are imported where they are needed: the driver's preflight runs this before Ray starts.
"""

import importlib.util
import shutil
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import DatasetSource
from dsft_api.spec.placement import StorageSpec
from dsft_trainer.data import readers
from dsft_trainer.data.formats import TRAIN_FIELD, Column, columns_of
from dsft_trainer.errors import TrainerError

if TYPE_CHECKING:
    from dsft_trainer.checkpoint.store import Entry, Store

Kind = Literal["model", "tokenizer", "dataset"]

# What a model needs besides weights. Pickled weights (*.bin, *.pt) are never fetched.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.py")

WANTED_FILES: dict[Kind, tuple[str, ...] | None] = {
    "model": MODEL_FILES,
    "tokenizer": TOKENIZER_FILES,
    "dataset": None,
}
_SET_HF_TOKEN = "set HF_TOKEN (spec.env, by secretKeyRef) to a token that may read it"  # noqa: S105

FAILURES: dict[Kind, FailureClass] = {
    "model": FailureClass.MODEL_DENIED,
    "tokenizer": FailureClass.MODEL_DENIED,
    "dataset": FailureClass.DATA_INVALID,
}


def fetch(uri: str, *, storage: StorageSpec, cache: Path, kind: Kind, revision: str | None = None) -> Path:
    """Bring what the URI names onto this machine, and return its file or folder.

    s3:// goes below `cache`, hf:// into the Hub's own cache (`HF_HOME`); file:// and python:// are used where they are.
    `storage` says which S3 endpoint. Call it from one process of a node at a time.

    Raises:
        TrainerError: ModelDenied (models, tokenizers) or DataInvalid (data sets), naming the URI and the way out; Unknown, which
            is tried again, if the Hub cannot be reached.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "hf":
        path = _fetch_hub(rest, kind, revision)
    elif revision is not None:
        raise TrainerError(
            FailureClass.CONFIG_INVALID, f"revision {revision} is set, but {uri} has none", "remove it, or use hf://"
        )
    elif scheme == "s3":
        path = _fetch_s3(uri, storage, cache, kind)
    elif scheme == "file":
        path = _local_file(uri, kind)
    elif scheme == "python":
        path = _package_file(rest, uri, kind)
    else:
        raise TrainerError(FAILURES[kind], f"{uri}: unknown scheme {scheme}", "use hf://, s3://, file:// or python://")
    if kind == "model":
        check_model_files(uri, [file.name for file in path.iterdir()] if path.is_dir() else [])
    return path


def check_model_files(uri: str, names: Collection[str]) -> None:
    """Refuse a folder that holds no model.

    Raises:
        TrainerError: ModelDenied.
    """
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise TrainerError(
            FAILURES["model"], f"{uri} lacks config.json or *.safetensors", "save the model with save_pretrained"
        )


def load_rows(source: DatasetSource, *, storage: StorageSpec, cache: Path, field: str = TRAIN_FIELD) -> pa.Table:
    """The rows of a data set: the columns that its format reads, under the format's own names, in the data's order.

    JSON lines, CSV and Parquet files, folders of them (in the order of names), folders of `datasets.save_to_disk`, or a
    data set on the Hub. Held in memory. `field` is where the source stands in the manifest.

    Raises:
        TrainerError: DataInvalid for whatever cannot be read, a missing column, or no rows; ConfigInvalid for
            revision, subset or split where the source has none.
    """
    columns = columns_of(source, field)
    if source.uri.startswith("hf://"):
        table = _load_hub(source, columns)
    else:
        refuse_unused(source, "subset", field)
        path = fetch(source.uri, storage=storage, cache=cache, kind="dataset", revision=source.revision)
        if path.is_dir() and readers.is_saved(path):
            table = readers.read_saved(path, source.split, columns, field)
        else:
            refuse_unused(source, "split", field)
            table = readers.read_path(path, columns)
    if table.num_rows == 0:
        raise TrainerError(FailureClass.DATA_INVALID, f"{source.uri} holds no rows", f"check {field}.uri")
    return table


def refuse_unused(source: DatasetSource, name: str, field: str) -> None:
    """Refuse `revision`, `subset` or `split` where the source has none.

    Raises:
        TrainerError: ConfigInvalid.
    """
    value = getattr(source, name)
    if value is not None:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"{field}.{name} is {value}, but {source.uri} has no {name}s",
            f"remove it, or let {field}.uri name the file that holds {value}",
        )


def _local_file(uri: str, kind: Kind) -> Path:
    parts = urlsplit(uri)
    if parts.netloc:
        raise TrainerError(
            FAILURES[kind], f"{uri} names the host {parts.netloc}", "write an absolute path after file://"
        )
    path = Path(unquote(parts.path))
    if not path.exists():
        raise TrainerError(FAILURES[kind], f"{path} does not exist", f"check {uri}, and that the path is mounted here")
    return path


def _package_file(rest: str, uri: str, kind: Kind) -> Path:
    package, _, inner = rest.partition("/")
    remedy = f"install the extra that ships it (pip install {package.partition('.')[0]})"
    try:
        # Finds the package without running it.
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TrainerError(FAILURES[kind], f"{uri}: no Python package {package} is installed here", remedy)
    for root in map(Path, spec.submodule_search_locations):
        path = (root / inner).resolve()
        if path.is_relative_to(root.resolve()) and path.exists():
            return path
    raise TrainerError(FAILURES[kind], f"{uri}: package {package} has no {inner}", remedy)


def _fetch_hub(rest: str, kind: Kind, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = WANTED_FILES[kind]
    try:
        folder = huggingface_hub.snapshot_download(
            rest,
            repo_type="dataset" if kind == "dataset" else "model",
            revision=revision,
            allow_patterns=list(patterns) if patterns else None,
        )
    except (OSError, ValueError, errors.HTTPError) as error:
        raise hub_error(f"hf://{rest}", kind, error) from error
    return Path(folder)


def _fetch_s3(uri: str, storage: StorageSpec, cache: Path, kind: Kind) -> Path:
    from dsft_trainer.checkpoint.store import get_files

    uri = uri.rstrip("/")
    target = cache / "s3" / uri.removeprefix("s3://")
    # Always fetched anew: an object replaced by one of the same size must not be taken for the old one, and what was
    # deleted there must not linger here.
    if target.is_dir():
        shutil.rmtree(target)
    store, entries = s3_objects(uri, storage, kind)
    if store.uri == uri:
        get_files(store, [(entry.key, target / entry.key) for entry in entries])
    else:
        store.get_file(entries[0].key, target)
    return target


def s3_objects(uri: str, storage: StorageSpec, kind: Kind) -> "tuple[Store, list[Entry]]":
    """The objects of a folder, with the folder as a store; or the one object of that name, with the folder it lies in.

    Raises:
        TrainerError: ModelDenied or DataInvalid if there are none; StorageDenied if S3 does not let us look.
    """
    from dsft_trainer.checkpoint.store import open_store

    uri = uri.rstrip("/")
    folder = open_store(uri, endpoint_url=storage.endpoint_url, region=storage.region)
    entries = [entry for entry in folder.list() if _is_wanted(entry.key, kind)]
    if entries:
        return folder, entries
    parent, _, name = uri.rpartition("/")
    if parent != "s3:/":
        around = open_store(parent, endpoint_url=storage.endpoint_url, region=storage.region)
        entry = around.entry(name)
        if entry is not None:
            return around, [entry]
    raise TrainerError(FAILURES[kind], f"{uri} holds no objects", "check the URI and spec.storage.endpointUrl")


def _is_wanted(key: str, kind: Kind) -> bool:
    patterns = WANTED_FILES[kind]
    return patterns is None or any(fnmatch(key, pattern) for pattern in patterns)


def _load_hub(source: DatasetSource, columns: Sequence[Column]) -> pa.Table:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    name = source.uri.removeprefix("hf://")
    try:
        rows = datasets.load_dataset(
            name, source.subset, split=source.split or "train", revision=source.revision or "main"
        )
    except (OSError, ValueError, errors.HTTPError, DatasetsError) as error:
        raise hub_error(source.uri, "dataset", error) from error
    readers.require(rows.column_names, columns, source.uri)
    selected = rows.select_columns([column.source_name for column in columns])
    return readers.pick(selected.with_format("arrow")[:], columns, source.uri)


def may_pass(error: BaseException) -> bool:
    """Whether the Hub, or the way to it, failed in a way that passes by itself: silence, too many requests, its own fault."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return False
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return may_pass(error.__cause__)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, errors.HTTPError | ConnectionError | TimeoutError | errors.LocalEntryNotFoundError)


def hub_error(uri: str, kind: Kind, error: Exception) -> TrainerError:
    """What a failure of the Hub means for the user: denied, misspelt, or not to be reached."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    match error:
        case errors.GatedRepoError():
            problem, remedy = "is gated", f"accept its terms on the Hub, and {_SET_HF_TOKEN}"
        case errors.RepositoryNotFoundError() | DatasetNotFoundError():
            problem, remedy = "does not exist on the Hub, or is private", f"check the name, or {_SET_HF_TOKEN}"
        case errors.RevisionNotFoundError():
            problem, remedy = "has no such revision", "check revision"
        case _ if may_pass(error):
            problem = f"{uri} cannot be fetched: the Hub cannot be reached: {first_line}"
            return TrainerError(
                FailureClass.UNKNOWN, problem, "check the network, proxy and HF_ENDPOINT, or use s3:// or file://"
            )
        case _:
            problem, remedy = "cannot be fetched", f"check uri, revision, subset and split, or {_SET_HF_TOKEN}"
    return TrainerError(FAILURES[kind], f"{uri} {problem}: {first_line}", remedy)
