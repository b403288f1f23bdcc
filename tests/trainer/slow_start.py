"""`one_start`, but the watchdogs of all ranks believe that it takes hours to fetch the model, to tokenise and to export.

Each of these leaves a file when it begins and all ranks wait for it, which puts every rank's clock forward, and stays for a few
looks of the watchdogs. A rank that is late is not yet waiting: hours would pass for it in what it did before.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dsft_trainer import rank, run_data
from dsft_trainer.watchdog import Watchdog
from tests.trainer import one_start
from tests.trainer.runs import wait_until

HOURS = 3
LOOKS_SECONDS = 3.0


def main(folder: Path) -> None:
    """As `one_start`."""
    waits = 0

    def clock() -> float:
        return time.monotonic() + HOURS * 3600 * len(list(folder.glob("slow-*")))

    class Telling(Watchdog):
        @contextmanager
        def patient(self) -> Iterator[None]:
            nonlocal waits
            waits += 1
            with super().patient():
                (folder / f"waits-{waits}-{os.environ['RANK']}").touch()
                yield

    def all_wait() -> bool:
        return len(list(folder.glob(f"waits-{waits}-*"))) == int(os.environ["WORLD_SIZE"])

    def slow(action: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*given: Any, **named: Any) -> Any:
            wait_until(all_wait, "the other ranks to wait")
            (folder / f"slow-{action.__name__}").touch()
            time.sleep(LOOKS_SECONDS)
            return action(*given, **named)

        return slowed

    rank.Watchdog = partial(Telling, clock=clock)  # type: ignore[misc]
    for module, action in ((rank, rank.fetch), (run_data, run_data.tokenize_here), (rank, rank.export)):
        setattr(module, action.__name__, slow(action))
    one_start.main(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
