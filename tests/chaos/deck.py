"""Which kills there will be: kinds in fixed shares, in an order and with details that follow from a seed alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is done to the run."""

    WORKER = "worker"
    """A rank."""
    DRIVER = "driver"
    """The trainer that started the ranks."""
    MACHINE = "machine"
    """All processes at once."""
    UPLOAD = "during an upload"
    """One of them, while a file of a checkpoint is on its way."""
    COMMIT = "during a commit"
    """One of them, while all files have arrived and COMMIT.json is on its way."""
    S3_SILENT = "S3 silent"
    """S3 answers nothing for seconds; maybe one of them is killed then."""
    S3_KILLED = "S3 killed"
    """The S3 server is killed, and started again after seconds; maybe one of them is killed then."""


class Victim(StrEnum):
    """Who is killed."""

    NOBODY = "nobody"
    WORKER = "worker"
    DRIVER = "driver"
    MACHINE = "machine"


class Fate(StrEnum):
    """What becomes of the request that was on its way."""

    LOST = "lost"
    ARRIVES = "arrives"
    """It is stored at once; only its sender does not live to learn so."""
    LATE = "arrives late"
    """When the next start of the ranks has claimed the run."""


PER_TEN = {
    Kind.WORKER: 2,
    Kind.DRIVER: 1,
    Kind.MACHINE: 1,
    Kind.UPLOAD: 2,
    Kind.COMMIT: 2,
    Kind.S3_SILENT: 1,
    Kind.S3_KILLED: 1,
}
RUNTIMES = ("ray", "torchrun")
# Parts of the names of what a checkpoint consists of: state, generators, and a rank's own manifest.
FILES = ("optim_states", "rng-", "/rank-")


@dataclass(frozen=True)
class Card:
    """One kill."""

    kind: Kind
    victim: Victim
    fate: Fate
    file: str
    """For an upload: which files are held up."""
    delay: float
    """Seconds after the moment that the kind waits for."""
    down_seconds: float
    rank: int
    runtime: str
    """Of the start that follows, should one be needed."""

    def __str__(self) -> str:
        match self.kind:
            case Kind.WORKER | Kind.DRIVER | Kind.MACHINE:
                return f"{self.kind} +{self.delay:.2f} s"
            case Kind.UPLOAD:
                return f"{self.kind} of {self.file} ({self.fate}): {self.victim}"
            case Kind.COMMIT:
                return f"{self.kind} ({self.fate}): {self.victim}"
            case _:
                return f"{self.kind} for {self.down_seconds:.1f} s: {self.victim}"


def deck(kills: int, seed: int) -> list[Card]:
    """So many kills."""
    chance = random.Random(seed)
    kinds: list[Kind] = []
    while len(kinds) < kills:
        ten = [kind for kind, share in PER_TEN.items() for _ in range(share)]
        chance.shuffle(ten)
        kinds += ten
    runtimes = _alternating(chance)
    return [_card(kind, chance, next(runtimes)) for kind in kinds[:kills]]


def _alternating(chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(RUNTIMES, len(RUNTIMES))


def _card(kind: Kind, chance: random.Random, runtime: str) -> Card:
    match kind:
        case Kind.WORKER | Kind.DRIVER | Kind.MACHINE:
            victim = Victim(kind.value)
        case Kind.UPLOAD | Kind.COMMIT:
            # Mostly ranks: what they leave behind is found by ranks of the same attempt.
            victim = chance.choice([Victim.WORKER, Victim.WORKER, Victim.DRIVER, Victim.MACHINE])
        case _:
            victim = chance.choice([Victim.NOBODY, Victim.NOBODY, Victim.WORKER, Victim.DRIVER, Victim.MACHINE])
    return Card(
        kind,
        victim,
        chance.choice(list(Fate)),
        chance.choice(FILES),
        delay=chance.uniform(0, 1.0),
        down_seconds=chance.uniform(2.0, 6.0),
        rank=chance.randrange(2),
        runtime=runtime,
    )
