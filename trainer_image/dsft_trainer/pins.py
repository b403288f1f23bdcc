"""What the run's inputs are, exactly: found by the first attempt, and held to by every later one.

A branch on the Hub moves, and a file in a bucket is replaced; a run that goes on from a checkpoint must not notice either.
So the commit of a Hub model or data set is used again, and data that has changed under the run is refused.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import DatasetSource, DataSpec
from dsft_api.status import Inputs
from dsft_trainer.checkpoint.origin import Pin, choose
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data.formats import EVAL_FIELD, eval_source
from dsft_trainer.data.sources import fetch, hub_error, s3_objects
from dsft_trainer.data.tokens import digest_of_template, template_of_config_map
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

HUB = "hf://"
HUB_SECONDS = 30.0
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json", "*.jinja")
"""Where transformers looks for chat templates in a tokenizer's folder."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(job: Job, known: Inputs) -> Job:
    """The job with `resolved` complete, and with the Hub's commits in place of branches. `known`: by earlier attempts.

    Raises:
        TrainerError: ModelDenied, DataInvalid or (startFrom) ConfigInvalid for what is not there; DataInvalid if the data
            or its chat template is not what it was.
    """
    work = job.spec.workload()
    model_commit = known.model_revision or _commit(work.model.uri, work.model.revision, "model")
    model = work.model.model_copy(update={"revision": model_commit or work.model.revision})
    data, commits = _pinned_data(work.data, known)
    eval_commit = known.eval_revision or _eval_commit(data)
    data = _eval_at(data, eval_commit)
    spec = job.spec.model_copy(update={"model": model, "data": data})
    job = job.model_copy(update={"spec": spec})
    digest = data_digest(job)
    _refuse_another("data", digest, known.data_digest)
    template_commit, template_digest = _template_pins(job, known)
    start = starting_point(job, known)
    found = Inputs(
        model_revision=model_commit,
        data_revision=commits[0] or None if data.train else None,
        mixture_revisions=tuple(commits) if data.mixture and any(commits) else (),
        eval_revision=eval_commit,
        data_digest=known.data_digest or digest,
        template_revision=template_commit,
        template_digest=template_digest,
        start_uri=start.uri if start else None,
        start_digest=start.digest if start else None,
    )
    return job.model_copy(update={"resolved": found})


def _refuse_another(what: str, digest: str | None, known: str | None) -> None:
    if known and digest and digest != known:
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"the {what} is not what the run began with: its digest is {digest}, and was {known}",
            f"put the {what} back as it was, or start a new run on the new one",
        )


def _pinned_data(data: DataSpec, known: Inputs) -> tuple[DataSpec, list[str]]:
    """The data with commits in place of branches, and the commit of each training data set, empty for one without."""
    sources = [source for _, source in data.sources()]
    pins = (*_known_commits(data, known), *[""] * len(sources))
    commits = [
        pin or _commit(source.uri, source.revision, "dataset") or "" for source, pin in zip(sources, pins, strict=False)
    ]
    return _at_commits(data, commits), commits


def _known_commits(data: DataSpec, known: Inputs) -> Sequence[str]:
    """Of the training data sets, by earlier attempts; empty for one without."""
    return known.mixture_revisions if data.mixture else (known.data_revision or "",)


def _at_commits(data: DataSpec, commits: Sequence[str]) -> DataSpec:
    """The data at these commits; where one is empty, at the revision that was asked for."""
    sources = [source for _, source in data.sources()]
    pinned = [
        source.model_copy(update={"revision": commit or source.revision})
        for source, commit in zip(sources, (*commits, *[""] * len(sources)), strict=False)
    ]
    return data.model_copy(update={"train": pinned[0]} if data.train else {"mixture": tuple(pinned)})


def with_known_commits(job: Job) -> Job:
    """The job with the Hub's commits of earlier attempts in place of branches, as `pinned` has it, and nothing asked for."""
    known = job.resolved
    if known is None or job.spec.model is None or job.spec.data is None:
        return job
    before = _known_commits(job.spec.data, known)
    model = job.spec.model.model_copy(update={"revision": known.model_revision or job.spec.model.revision})
    data = _eval_at(_at_commits(job.spec.data, before), known.eval_revision)
    spec = job.spec.model_copy(update={"model": model, "data": data})
    return job.model_copy(update={"spec": spec})


def _eval_commit(data: DataSpec) -> str | None:
    """The commit of evaluation data that has a place of its own; what has none is where the training data is."""
    source = eval_source(data)
    if source is None or data.eval is None or not (data.eval.uri or data.eval.revision):
        return None
    return _commit(source.uri, source.revision, "dataset")


def _eval_at(data: DataSpec, commit: str | None) -> DataSpec:
    if data.eval is None or commit is None:
        return data
    return data.model_copy(update={"eval": data.eval.model_copy(update={"revision": commit})})


def _template_pins(job: Job, known: Inputs) -> tuple[str | None, str | None]:
    """The commit of the Hub's model that gives the chat template; elsewhere a digest of it, or of the files that may hold it."""
    template = job.spec.workload().data.chat_template
    if template and template.config_map_ref:
        return None, digest_of_template(template_of_config_map(known.template_digest))
    uri = template.model_uri if template else None
    if uri is None:
        return None, None
    if uri.startswith(HUB):
        return known.template_revision or _commit(uri, None, "model"), None
    digest = hashlib.sha256()
    for line in _file_lines(uri, job, "tokenizer", TEMPLATE_FILES):
        digest.update(f"{line}\n".encode())
    found = f"sha256:{digest.hexdigest()}"
    _refuse_another(f"chat template of {uri}", found, known.template_digest)
    return None, known.template_digest or found


def starting_point(job: Job, known: Inputs) -> Pin | None:
    """The checkpoint that `spec.startFrom` meant when the run began.

    Raises:
        TrainerError: ConfigInvalid if there is no such run or checkpoint.
    """
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
    held_out = eval_source(work.data)
    for field, source in (*work.data.sources(), *([(EVAL_FIELD, held_out)] if held_out else [])):
        name = field.removeprefix("spec.data.")
        lines = _hub_lines(source) if source.uri.startswith(HUB) else _file_lines(source.uri, job, "dataset")
        if lines is None:
            return None
        for line in lines:
            digest.update(f"{name}\0{line}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _hub_lines(source: DatasetSource) -> list[str] | None:
    commit = _commit(source.uri, source.revision, "dataset")
    return [f"{commit}\0{source.subset}\0{source.split}"] if commit else None


def _file_lines(
    uri: str, job: Job, kind: Literal["tokenizer", "dataset"], names: Sequence[str] = ("*",)
) -> Iterator[str]:
    """A line for each file or object whose path there is like one of the names."""

    def counts(path: str) -> bool:
        return any(fnmatch(path, name) for name in names)

    storage = job.spec.storage
    if uri.startswith("s3://"):
        _, entries = s3_objects(uri, storage, kind)
        yield from (f"{entry.key}\0{entry.size}\0{entry.etag}" for entry in entries if counts(entry.key))
        return
    # Local: nothing is fetched, so the cache stays empty.
    path = fetch(uri, storage=storage, cache=Path("/nonexistent"), kind=kind)
    if path.is_file():
        yield f"{path.name}\0{_sha256(path)}"
        return
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and counts(relative.as_posix()) and not any(part.startswith(".") for part in relative.parts):
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
