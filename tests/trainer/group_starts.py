"""Group starts of a run whose state is a few words, on one rank: what tests of checkpoints save, restore and look at."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from dsft_trainer.checkpoint.checkpointer import Checkpointer, Identity, Point
from dsft_trainer.checkpoint.commits import Patience
from dsft_trainer.checkpoint.listing import Retention, read_commits
from dsft_trainer.checkpoint.origin import Origin
from dsft_trainer.checkpoint.restore import Convert, Restorer
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from dsft_trainer.runtime import Place

KEEP_TEN = Retention(keep_last=10, keep_best=0, metric="loss", larger_is_better=False)


class State:
    """One rank's state: a large file and a small one in a folder below, as DeepSpeed writes them."""

    def __init__(self) -> None:
        self.value = ""

    def stage(self, folder: Path, tag: str) -> "Copied":
        return Copied(self.value)

    def load(self, folder: Path, tag: str) -> None:
        self.value = (folder / tag / "zero" / "optimizer.pt").read_text()
        assert (folder / tag / "model.pt").read_text() == self.value * 1000

    def load_universal(self, folder: Path, tag: str) -> None:
        self.value = (folder / tag / "zero" / "whole.pt").read_text()

    def load_weights(self, folder: Path, tag: str) -> None:
        self.load_universal(folder, tag)
        self.value = f"weights of {self.value}"


class Copied:
    """The state as it was."""

    def __init__(self, value: str) -> None:
        self.value = value

    def write(self, folder: Path) -> None:
        (folder / "zero").mkdir(parents=True)
        (folder / "model.pt").write_text(self.value * 1000)
        (folder / "zero" / "optimizer.pt").write_text(self.value)


class Start:
    """One group start of a run."""

    def __init__(
        self,
        store: Store,
        scratch: Path,
        *,
        retention: Retention = KEEP_TEN,
        world_size: int = 1,
        convert: Convert | None = None,
        origin: Callable[[], Origin] | None = None,
    ) -> None:
        # Each start is another machine: it finds nothing of the one before.
        shutil.rmtree(scratch, ignore_errors=True)
        place = Place(rank=0, world_size=world_size, local_rank=0)
        self.checkpointer = Checkpointer(
            store,
            place,
            scratch,
            Identity(spec_hash="sha256:0", zero_stage=3, precision="fp32", versions={"torch": "2"}),
            retention,
            Restorer(
                store,
                place,
                scratch,
                on_world_size_change="convert" if convert else "refuse",
                convert=convert or Converter(),
                origin=origin,
            ),
        )
        self.state = State()

    def begin(self, attempt: int) -> int:
        """Claim and load; the step to go on from."""
        self.checkpointer.begin(attempt)
        self.checkpointer.convert()
        self.checkpointer.load(self.state)
        return self.checkpointer.restorer.first_step

    def save(self, step: int, loss: float | None = None) -> str:
        """Commit a state that tells its step; the checkpoint's name. With a loss also what early stopping knows."""
        self.state.value = f"step {step} of {self.checkpointer.claim}"
        metrics = {} if loss is None else {"loss": loss}
        patience = None if loss is None else Patience(best=loss, without=0)
        point = Point(step, samples=8 * step, epoch=step / 10, metrics=metrics, patience=patience)
        self.checkpointer.start(self.state, point)
        outcome = self.checkpointer.settle()
        if isinstance(outcome, TrainerError):
            raise outcome
        return outcome.name


def folders(store: Store) -> set[str]:
    return {entry.key.split("/")[1] for entry in store.list("checkpoints")}


def steps(store: Store) -> list[int]:
    return [commit.step for commit in read_commits(store)]


class Converter:
    """Converts `State`'s files as DeepSpeed does its own, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, source: Path, target: Path) -> None:
        self.calls += 1
        (target / "zero").mkdir(parents=True)
        (target / "zero" / "whole.pt").write_text((source / "zero" / "optimizer.pt").read_text())
        if self.error is not None:
            raise self.error


def of_two_ranks(store: Store, scratch: Path, *, steps: tuple[int, ...] = (3,)) -> list[str]:
    """Commits of a run, made to look as if two ranks had written them."""
    start = Start(store, scratch)
    start.begin(1)
    names = [start.save(step) for step in steps]
    for name in names:
        key = f"checkpoints/{name}/COMMIT.json"
        commit = {**json.loads(store.get_bytes(key) or b""), "worldSize": 2}
        store.put_bytes(key, json.dumps(commit).encode())
    return names


def contents(store: Store, folder: str) -> dict[str, bytes | None]:
    return {entry.key: store.get_bytes(entry.key) for entry in store.list(folder)}
