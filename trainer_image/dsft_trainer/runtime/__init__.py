"""What a rank needs from whoever started it. The training loop knows this protocol and torch.distributed, nothing else.

Two runtimes exist: Ray Train (`runtime.ray`), and torch elastic (`runtime.torchrun`), which needs no Ray and shows that
the losses come from the loop and not from its launcher.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import pyarrow as pa

from dsft_api.progress import Progress, TrainerFailure


class Outcome(StrEnum):
    """How an attempt ended, when it did not fail."""

    SUCCEEDED = "succeeded"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Place:
    """Where a rank is among its peers."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """True on the rank that writes what is written once per run."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """True on the rank that fetches what is fetched once per node."""
        return self.local_rank == 0


@dataclass(frozen=True)
class Wishes:
    """What the launcher was asked for: to commit and stop, and (a value to answer with) to commit and go on."""

    drain: bool = False
    save: str | None = None


class Runtime(Protocol):
    """One rank's connection to its launcher. `torch.distributed` is initialised before a Runtime exists."""

    place: Place
    opening: Progress
    """The document that this start of the ranks goes on from."""

    def publish(self, progress: str) -> None:
        """Hand the latest progress document to the launcher; never blocks, the newest wins. Rank 0 only."""
        ...

    def wishes(self) -> Wishes:
        """What the launcher asks of this rank, as far as it has heard. Cheap: asked at every step."""
        ...

    def fail(self, failure: TrainerFailure) -> None:
        """Tell the launcher why this rank is about to die; blocks for seconds at most."""
        ...

    def tokenized(self) -> dict[str, pa.Table]:
        """The data sets that the launcher tokenised in parallel, by name; empty when ranks must do it themselves."""
        ...
