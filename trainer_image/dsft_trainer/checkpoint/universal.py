"""Checkpoints that another number of ranks can load: DeepSpeed's universal format, converted once and kept in storage.

ZeRO-3 checkpoints are cut by rank; a universal one is cut by parameter. The first rank fetches a whole commit, each file checked
against its digest, converts it on its disk, uploads the result to `universal/<claim>/`, and writes COMMIT.json there last. That
is the protocol of checkpoints: what a kill leaves behind has no COMMIT.json and is never read. The commit itself is only read.

A conversion is a cache, and belongs to no lineage. It names its commit and that one's digest, and lives until the first
checkpoint of the new number of ranks is committed.
"""

import argparse
import contextlib
import hashlib
import io
import logging
import shutil
from pathlib import Path

from pydantic import Field, ValidationError

from dsft_api.base import ApiModel
from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.commits import COMMIT_FILE, ClaimId, Commit, CommittedFile
from dsft_trainer.checkpoint.files import fetch, missing, upload
from dsft_trainer.checkpoint.listing import manifest
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

UNIVERSAL = "universal"


class Conversion(ApiModel):
    """`universal/<claim>/COMMIT.json`: written last, so its presence means that every file it lists is whole."""

    claim: ClaimId = Field(description="The group start that converted.")
    source: str = Field(description="Name of the commit that was converted.")
    source_digest: str = Field(description="SHA-256 of that one's COMMIT.json.")
    files: tuple[CommittedFile, ...]

    @property
    def folder(self) -> str:
        """Where it is in the run's folder."""
        return _folder(self.claim)

    def fetch(self, store: Store, folder: Path) -> bool:
        """Download it to `folder`; False if a file is missing or differs."""
        return fetch(store, self.folder, self.files, folder)


def _folder(claim: ClaimId) -> str:
    return f"{UNIVERSAL}/{claim}"


def _digest(commit: Commit) -> str:
    return hashlib.sha256(manifest(commit)).hexdigest()


def find(store: Store, commit: Commit) -> Conversion | None:
    """A committed conversion of this very commit, if there is one."""
    for entry in store.list(f"{UNIVERSAL}/"):
        if not entry.key.endswith(f"/{COMMIT_FILE}"):
            continue
        try:
            found = Conversion.model_validate_json(store.get_bytes(entry.key) or b"")
        except ValidationError as error:
            log.warning("%s is damaged and is left out: %s", entry.key, error)
            continue
        if (found.source, found.source_digest) == (commit.name, _digest(commit)):
            return found
    return None


def publish(store: Store, commit: Commit, claim: ClaimId, folder: Path) -> Conversion:
    """Upload a converted commit and make it count. `folder` may lose its files.

    Raises:
        TrainerError: Unknown if it did not arrive whole.
    """
    files = upload(store, folder, _folder(claim), rank=0)
    absent = missing(store, _folder(claim), files)
    if absent or not files:
        raise TrainerError(
            FailureClass.UNKNOWN, f"the conversion of {commit.name} did not arrive whole in {store.uri}: {absent}"
        )
    conversion = Conversion(claim=claim, source=commit.name, source_digest=_digest(commit), files=files)
    text = conversion.model_dump_json(by_alias=True, indent=1).encode()
    store.put_bytes(f"{conversion.folder}/{COMMIT_FILE}", text)
    return conversion


def sweep(store: Store, newest: ClaimId, kept: Conversion | None = None) -> None:
    """Delete conversions, whole ones and half-made ones, but for `kept` and those of claims after `newest`."""
    keys = [entry.key for entry in store.list(f"{UNIVERSAL}/")]
    claims = {name: ClaimId.parse(name) for name in (key.split("/")[1] for key in keys)}
    gone = {name for name, claim in claims.items() if claim is None or claim <= newest}
    if kept is not None:
        gone -= {str(kept.claim)}
    doomed = [key for key in keys if key.split("/")[1] in gone]
    # COMMIT.json goes first: what is half deleted must not count.
    store.delete(sorted(doomed, key=lambda key: not key.endswith(COMMIT_FILE)))


def convert(source: Path, target: Path) -> None:
    """Have DeepSpeed convert the checkpoint in `source` to the universal one in `target`.

    Needs room for two more checkpoints beside `source`. In this process and one file after the other: DeepSpeed would fork
    workers, which does not go with a process group and CUDA.
    """
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    # It tells its steps, and draws bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
