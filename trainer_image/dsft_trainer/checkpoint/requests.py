"""A checkpoint that somebody asked for: made at the next step boundary, and answered with its value once it is committed.

Only rank 0 hears requests; its vote in the step's reduction has all ranks save. A save that fails is not repeated for the
request's sake: the next one that is committed answers it.
"""

from collections.abc import Callable


class SaveRequests:
    """Requests of one group start, as rank 0 sees them. The last one counts: an older one is met by what is made for it."""

    def __init__(self, heard: Callable[[], str | None], answered: str | None = None) -> None:
        """`heard`: the value of the last request; `answered`: that of the last one met, from before this start."""
        self.answered = answered
        self._heard = heard
        self._value: str | None = None
        self._step: int | None = None

    def vote(self) -> float:
        """1 if there is a request that no save was made for, else 0."""
        value = self._heard()
        if value in (None, self.answered) or (value == self._value and self._step is not None):
            return 0.0
        self._value, self._step = value, None
        return 1.0

    def saved(self, step: int) -> None:
        """A save of this step begins."""
        if self._value is not None and self._step is None:
            self._step = step

    def committed(self, step: int) -> None:
        """The newest commit is of this step."""
        if self._step is not None and step >= self._step:
            self.answered = self._value
            self._value = self._step = None
