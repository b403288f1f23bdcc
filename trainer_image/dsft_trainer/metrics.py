"""Metrics of one group start: a JSON line per step and evaluation, TensorBoard events, trackers. Rank 0 only.

Objects cannot grow, so lines are stored in parts, `metrics/<claim>-<n>.jsonl`, one per upload. A commit is preceded by
an upload: the line of every committed step is in storage. The thread that saves may upload while the loop writes.
"""

import json
import logging
import textwrap
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Outcome
from dsft_trainer.samples import Sample
from dsft_trainer.trackers import Tracker

log = logging.getLogger(__name__)


class MetricsLog:
    """Collects lines and events between uploads."""

    def __init__(
        self, store: Store, claim: str, folder: Path, *, tensorboard: bool, trackers: Iterable[Tracker] = ()
    ) -> None:
        self._store = store
        self._claim = claim
        self._lines: list[str] = []
        self._parts = 0
        self._uploading = threading.Lock()
        self._events_folder = folder / "tensorboard"
        self._events = None
        self._trackers = tuple(trackers)
        if tensorboard:
            # Imported here: it takes half a second, on one rank only.
            from torch.utils.tensorboard.writer import SummaryWriter

            self._events = SummaryWriter(str(self._events_folder))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add one line; `kind` is train or eval, values are finite."""
        self._lines.append(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        for tracker in self._trackers:
            tracker.write(kind, step, values)

    def keep_samples(self, step: int, samples: Sequence[Sample]) -> str | None:
        """Store texts at once, and show them in TensorBoard; where they are, None if there are none or storage fails."""
        if not samples:
            return None
        if self._events is not None:
            for sample in samples:
                self._events.add_text(f"samples/{sample.row}", _markdown(sample), step)
        key = f"samples/{self._claim}-step-{step:08d}.jsonl"
        lines = (json.dumps(sample.to_wire(), ensure_ascii=False) + "\n" for sample in samples)
        store = self._store.impatient()
        try:
            store.put_bytes(key, "".join(lines).encode())
        except TrainerError as error:
            log.warning("the samples of step %s cannot be kept: %s", step, error)
            return None
        return f"{store.uri}/{key}"

    def upload(self) -> None:
        """Bring storage up to date. What could not be stored is kept for the next time."""
        with self._uploading:
            lines = list(self._lines)
            if lines:
                self._store.put_bytes(f"metrics/{self._claim}-{self._parts:05d}.jsonl", "".join(lines).encode())
                self._parts += 1
                del self._lines[: len(lines)]
            if self._events is not None:
                self._events.flush()
                for path in self._events_folder.iterdir():
                    self._store.put_bytes(f"tensorboard/{self._claim}/{path.name}", path.read_bytes())

    def close(self, outcome: Outcome | None) -> None:
        """Bring storage up to date for the last time; trackers are told how it ended, `None` for a failure."""
        for tracker in self._trackers:
            tracker.close(outcome)
        self.upload()
        if self._events is not None:
            self._events.close()


def _markdown(sample: Sample) -> str:
    parts = {"prompt": sample.prompt, "completion": sample.completion, "expected": sample.expected}
    return "\n\n".join(f"**{name}**\n\n" + textwrap.indent(text, "    ") for name, text in parts.items())
