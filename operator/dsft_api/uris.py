"""The URIs of a spec: which schemes each place takes, and what each scheme must name."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

from dsft_api.problem import Problem
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.identity import DatasetSource, EvalSource

_SOURCES = ("hf", "s3", "file", "python")
_STORAGE = ("s3", "file")
_HTTP = ("https", "http")
ARCHIVE, GIT = "spec.program.source.archive", "spec.program.source.git"
_SCHEMES_OF = {"spec.storage.uri": _STORAGE, ARCHIVE: _STORAGE, GIT: _HTTP}


@dataclass(frozen=True)
class Scheme:
    """What follows `scheme://`, as a pattern and as an example."""

    pattern: re.Pattern[str]
    example: str


SCHEMES: dict[str, Scheme] = {
    "hf": Scheme(
        re.compile(r"(?!datasets/)[\w.-]+(/[\w.-]+)?"), "hf://ORG/NAME, with the revision in a field of its own"
    ),
    "s3": Scheme(re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?"), "s3://BUCKET/PATH"),
    "file": Scheme(re.compile(r"/.*"), "file:///ABSOLUTE/PATH, with three slashes"),
    "https": Scheme(re.compile(r"[^/@]+/.+"), "https://HOST/PATH, without user name and password"),
    "http": Scheme(re.compile(r"[^/@]+/.+"), "http://HOST/PATH, without user name and password"),
    "python": Scheme(re.compile(r"(?!.*/\.\.(/|$))[A-Za-z_][\w.]*/.+"), "python://PACKAGE/PATH"),
}

_DOTS = re.compile(r"/\.{1,2}/")
# Python's urlsplit drops tabs and newlines, and storage drops empty parts.
_UNCLEAR = re.compile(r"[\x00-\x1f\x7f\\]|.//")
# A file of rows has no splits; a folder may be a saved data set, which has.
_FILE_OF_ROWS = re.compile(r"\.(jsonl?|csv|parquet)(\.(gz|zst))?$")


def uris(spec: FineTuneSpec) -> Iterator[tuple[str, str]]:
    """Every URI that the user wrote, with its field."""
    if spec.model is not None:
        yield "spec.model.uri", spec.model.uri
    if spec.data is not None:
        yield from ((f"{field}.uri", source.uri) for field, source in spec.data.sources())
        if spec.data.eval is not None and spec.data.eval.uri is not None:
            yield "spec.data.eval.uri", spec.data.eval.uri
        template = spec.data.chat_template
        if template is not None and template.from_model is not None and "://" in template.from_model:
            yield "spec.data.chatTemplate.fromModel", template.from_model
    source = spec.program.source if spec.program is not None else None
    if source is not None and source.archive is not None:
        yield ARCHIVE, source.archive
    if source is not None and source.git is not None:
        yield GIT, source.git
    if spec.storage.uri is not None:
        yield "spec.storage.uri", spec.storage.uri


def check_uris(spec: FineTuneSpec) -> Iterator[Problem]:
    """Schemes are known where they stand, each URI names what its scheme needs, and Hub fields stand at Hub URIs."""
    for field, uri in uris(spec):
        yield from _check_uri(field, uri, _SCHEMES_OF.get(field, _SOURCES))
    yield from _hub_fields(spec)


def _check_uri(field: str, uri: str, allowed: tuple[str, ...]) -> Iterator[Problem]:
    scheme, _, rest = uri.partition("://")
    if scheme not in allowed:
        listed = ", ".join(f"{name}://" for name in allowed)
        yield Problem(field, f"{scheme}:// is not known here", f"use one of {listed}", uri)
    elif not SCHEMES[scheme].pattern.fullmatch(rest):
        yield Problem(field, f"is no {scheme}:// URI that can be read", f"write {SCHEMES[scheme].example}", uri)
    elif _DOTS.search(f"/{unquote(rest)}/"):
        # Some clients and servers would take them for a way up, out of the folder that an admin allowed.
        yield Problem(field, "has a part that is . or ..", "write the path without them", uri)
    elif _UNCLEAR.search(rest):
        remedy = "write the path without backslashes, control characters and empty parts"
        yield Problem(field, "has a part that is not read alike everywhere", remedy, uri)


def _hub_fields(spec: FineTuneSpec) -> Iterator[Problem]:
    """`revision` and `subset` exist on the Hub only, `split` there and in saved data sets."""
    if spec.model is not None and spec.model.revision and not _on_hub(spec.model.uri):
        yield _hub_only("spec.model.revision", spec.model.revision)
    if spec.data is None:
        return
    train, held_out = spec.data.train, spec.data.eval
    sources: list[tuple[str, str, DatasetSource | EvalSource]] = [
        (field, source.uri, source) for field, source in spec.data.sources()
    ]
    if held_out is not None and (uri := held_out.uri or (train.uri if train else None)):
        sources.append(("spec.data.eval", uri, held_out))
    for field, uri, source in sources:
        if _on_hub(uri):
            continue
        if source.revision:
            yield _hub_only(f"{field}.revision", source.revision)
        if source.subset:
            yield _hub_only(f"{field}.subset", source.subset)
        if source.split and _FILE_OF_ROWS.search(uri):
            remedy = "remove it; give evaluation data a uri of its own"
            yield Problem(f"{field}.split", "a file of rows has no splits", remedy, source.split)


def _on_hub(uri: str) -> bool:
    return uri.startswith("hf://")


def _hub_only(field: str, value: str) -> Problem:
    return Problem(field, "exists for hf:// URIs only", "remove it, or use an hf:// URI", value)
