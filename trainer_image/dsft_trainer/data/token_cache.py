"""The tokens of a run, kept in its own folder under a key of all that made them: a restart takes them from there.

Nobody else's folder is read, so that no run trains on what another tenant wrote. The manifest, with a SHA-256 of each file, is
written last: what is half written or damaged is never used, but made again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from dsft_api.base import ApiModel
from dsft_api.job import Job
from dsft_api.layout import TOKENS
from dsft_trainer.checkpoint.commits import CommittedFile
from dsft_trainer.checkpoint.files import fetch, upload
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.data.sources import TOKENIZER_FILES
from dsft_trainer.errors import TrainerError
from dsft_trainer.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# Raised when the same inputs make other tokens, or other files of them.
_FORMAT = 2


class Manifest(ApiModel):
    """What one folder of tokens holds."""

    files: tuple[CommittedFile, ...]


def key_of(job: Job, model: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A digest of all that decides the tokens; None if it is not known what the data is.

    `model` is the folder that the tokenizer came from; the tokenizer has its chat template by now.
    """
    if job.resolved is None or job.resolved.data_digest is None:
        return None
    work = job.spec.workload()
    # Code counts where it is run. Who tokenises without it does not fetch it.
    patterns = (*TOKENIZER_FILES, "*.py") if work.model.trust_remote_code else TOKENIZER_FILES
    files = sorted({path for pattern in patterns for path in model.glob(pattern)})
    facts = {
        "format": _FORMAT,
        "versions": {name: number for name, number in versions().items() if name in ("dsft", "transformers")},
        "digest": job.resolved.data_digest,
        "data": work.data.model_dump(mode="json", exclude={"loader", "group_by_length"}),
        "seed": work.training.seed,
        "tokenizer": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one key in a run's folder. With no key nothing is taken or kept."""

    store: Store
    key: str | None

    def tokens(self, folder: Path, make: Callable[[], Path], *, keeps: bool) -> Path:
        """The tokens in `folder`: from storage, or made anew and, by the one process that `keeps`, stored."""
        if not self.take(folder):
            make()
            if keeps:
                self.keep(folder)
        return folder

    def is_there(self) -> bool:
        """Whether `take` has something to take. That it is whole is not looked at."""
        return self.key is not None and self.store.entry(f"{self._place}/{MANIFEST}") is not None

    def take(self, folder: Path) -> bool:
        """Bring the tokens to `folder`; False, with nothing to be used there, if there are none that are whole."""
        if self.key is None:
            return False
        try:
            text = self.store.get_bytes(f"{self._place}/{MANIFEST}")
            if text is None:
                return False
            whole = fetch(self.store, self._place, Manifest.model_validate_json(text).files, folder)
        except (TrainerError, ValidationError) as error:
            log.warning("%s cannot be read: %s", self._place, error)
            whole = False
        if whole:
            log.info("tokens taken from %s", self._place)
        else:
            log.warning("the tokens in %s are not whole: tokenising again", self._place)
            shutil.rmtree(folder, ignore_errors=True)
        return whole

    def keep(self, folder: Path) -> None:
        """Store the tokens in `folder`, in place of those of other keys.

        That they cannot be stored is no failure: they would be made again.
        """
        if self.key is None:
            return
        links = folder.with_name(f"{folder.name}-kept")
        try:
            # The store may move what it is given.
            links.mkdir()
            for file in folder.glob("*.arrow"):
                (links / file.name).hardlink_to(file)
            discard(self.store, but=self.key)
            manifest = Manifest(files=upload(self.store, links, self._place, rank=0))
            self.store.put_bytes(f"{self._place}/{MANIFEST}", manifest.model_dump_json(by_alias=True).encode())
        except (TrainerError, OSError) as error:
            log.warning("the tokens cannot be kept: %s", error)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    @property
    def _place(self) -> str:
        return f"{TOKENS}/{self.key}"


def discard(store: Store, but: str | None = None) -> None:
    """Delete the tokens of all keys, or of all but one. That they cannot be deleted is no failure of the run."""
    try:
        store.delete(entry.key for entry in store.list(TOKENS) if entry.key.split("/")[1] != but)
    except TrainerError as error:
        log.warning("tokens that are no longer needed cannot be deleted: %s", error)
