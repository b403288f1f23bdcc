"""What the run's inputs are, exactly: found by the first attempt, and held to by every later one.

A branch on the Hub moves, and a file in a bucket is replaced; a run that goes on from a checkpoint must not notice either.
So the commit of a Hub model or data set is used again, and data that has changed under the run is refused.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import DatasetSource
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.origin import Pin, choose
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data.formats import eval_source
from dsft_trainer.data.sources import fetch, hub_error, s3_objects
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

HUB = "hf://"
HUB_SECONDS = 30.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(job: Job, known: Inputs) -> Job:
    """The job with `resolved` complete, and with the Hub's commits in place of branches. `known`: by earlier attempts.

    Raises:
        TrainerError: ModelDenied, DataInvalid or (startFrom) ConfigInvalid for what is not there; DataInvalid if the data
            is not what it was.
    """
    work = job.spec.workload()
    model_commit = known.model_revision or _commit(work.model.uri, work.model.revision, "model")
    data_commit = known.data_revision or _commit(work.train.uri, work.train.revision, "dataset")
    model = work.model.model_copy(update={"revision": model_commit or work.model.revision})
    train = work.train.model_copy(update={"revision": data_commit or work.train.revision})
    spec = job.spec.model_copy(update={"model": model, "data": work.data.model_copy(update={"train": train})})
    job = job.model_copy(update={"spec": spec})
    digest = data_digest(job)
    if known.data_digest and digest and digest != known.data_digest:
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"the data is not what the run began with: its digest is {digest}, and was {known.data_digest}",
            "put the data back as it was, or start a new run on the new data",
        )
    start = _start(job, known)
    found = Inputs(
        model_revision=model_commit,
        data_revision=data_commit,
        data_digest=known.data_digest or digest,
        start_uri=start.uri if start else None,
        start_digest=start.digest if start else None,
    )
    return job.model_copy(update={"resolved": found})


def _start(job: Job, known: Inputs) -> Pin | None:
    """The checkpoint that `spec.startFrom` meant when the run began."""
    if job.spec.start_from is None:
        return None
    if known.start_uri and known.start_digest:
        return Pin(known.start_uri, known.start_digest)
    storage = job.spec.storage
    return choose(
        job.spec.start_from,
        job.storage_prefix,
        job.spec.evaluation,
        lambda uri: open_store(uri, endpoint_url=storage.endpoint_url, region=storage.region),
    )


def data_digest(job: Job) -> str | None:
    """`sha256:...` of the training data and, if it has a source of its own, the evaluation data.

    It covers names and content of local files (file://, python://), key, size and ETag of objects (s3://), and the commit,
    subset and split of a data set on the Hub. Columns, format and a held-out share are the manifest's, which is frozen. A
    folder is covered as a whole, but for files whose names begin with a dot. None if the Hub cannot be asked.
    """
    work = job.spec.workload()
    digest = hashlib.sha256()
    for name, source in (("train", work.train), ("eval", eval_source(work.data))):
        if source is None:
            continue
        lines = _hub_lines(source) if source.uri.startswith(HUB) else _file_lines(source, job)
        if lines is None:
            return None
        for line in lines:
            digest.update(f"{name}\0{line}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _hub_lines(source: DatasetSource) -> list[str] | None:
    commit = _commit(source.uri, source.revision, "dataset")
    return [f"{commit}\0{source.subset}\0{source.split}"] if commit else None


def _file_lines(source: DatasetSource, job: Job) -> Iterator[str]:
    storage = job.spec.storage
    if source.uri.startswith("s3://"):
        _, entries = s3_objects(source.uri, storage, "dataset")
        yield from (f"{entry.key}\0{entry.size}\0{entry.etag}" for entry in entries)
        return
    # Local: nothing is fetched, so the cache stays empty.
    path = fetch(source.uri, storage=storage, cache=Path("/nonexistent"), kind="dataset")
    if path.is_file():
        yield f"{path.name}\0{_sha256(path)}"
        return
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield f"{relative.as_posix()}\0{_sha256(file)}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit(uri: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """The commit that a branch, tag or commit of a repository on the Hub is; None elsewhere, or if the Hub is out of reach.

    Out of reach is no failure yet: a node may have the files in its cache.
    """
    if not uri.startswith(HUB):
        return None
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().repo_info(
            uri.removeprefix(HUB), repo_type=kind, revision=revision, timeout=HUB_SECONDS
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
        raise hub_error(uri, kind, error) from error
    except (OSError, ValueError, errors.HTTPError) as error:
        log.warning("%s: its commit is not known, since the Hub cannot be asked: %s", uri, error)
        return None
    return info.sha
