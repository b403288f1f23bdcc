"""The one actor between driver and ranks: a named process beside the driver, which also `drain` finds.

It outlives the starts of the ranks inside an attempt. Each word of a rank says of which start it is, and only those of the
current one are heard: a rank that was thought lost may still be on its way to speak.
"""

from datetime import datetime
from pathlib import Path

from dsft_api.progress import Progress, TrainerFailure
from dsft_trainer.runtime import Wishes
from dsft_trainer.runtime.channel import Channel

# Of the Relay actors, so that `drain` finds them.
NAMESPACE = "dsft"
RELAY_PREFIX = "dsft-"


class Relay:
    """The channel's folder, reachable from other machines."""

    def __init__(self, folder: str) -> None:
        self._channel = Channel(Path(folder))
        self._outcome: str | None = None
        self._start: int | None = None
        self._heard = False
        self._seq = 0

    def begin(self, start: int) -> None:
        """Hear this start of the ranks from now on, and no other."""
        self._start, self._heard, self._outcome = start, False, None

    def close(self) -> None:
        """Take no more documents: the last word is the driver's, and one of a rank may still be on its way."""
        self._start = None

    def publish(self, start: int, progress: str) -> Wishes:
        """Replace the progress document; answers with what was requested."""
        if start == self._start:
            self._heard = True
            self._replace(progress)
        return Wishes(self._channel.drain_requested(), self._channel.save_requested())

    def announce(self, start: int, progress: str | None) -> bool:
        """The driver's document, if any, until the ranks are heard; answers whether they are still to be waited for."""
        silent = start == self._start and not self._heard
        if silent and progress is not None:
            self._replace(progress)
        return silent

    def request_drain(self) -> None:
        """Ask the ranks to commit and stop."""
        self._channel.request_drain()

    def drain_time(self) -> datetime | None:
        """When a drain was requested, if it was. Who asks this can be waited for."""
        if not self._channel.listens():
            self._channel.listen()
        return self._channel.drain_time()

    def request_save(self, value: str) -> None:
        """Ask the ranks to commit and go on."""
        self._channel.request_save(value)

    def fail(self, start: int, failure: str) -> None:
        """Record why a rank died."""
        if start == self._start:
            self._channel.fail(TrainerFailure.model_validate_json(failure))

    def set_outcome(self, start: int, outcome: str) -> None:
        """Rank 0's last word."""
        if start == self._start:
            self._outcome = outcome

    def drains(self) -> bool:
        """Whether it helps to ask, and to wait for a drain."""
        return self._channel.listens()

    def outcome(self) -> str | None:
        """What rank 0 said last."""
        return self._outcome

    def _replace(self, text: str) -> None:
        # Each start counts by itself: the order of the documents is that of their arrival here.
        progress = Progress.model_validate_json(text)
        self._seq = max(self._seq + 1, progress.seq)
        numbered = progress.model_copy(update={"seq": self._seq})
        self._channel.publish(numbered.model_dump_json(by_alias=True, exclude_none=True))
