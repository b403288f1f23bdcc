"""Which checkpoints count: commits, claims and the lineage between them. Pure.

A checkpoint exists when its COMMIT.json does. Every start of a worker group claims a number of its own (attempt and group)
and records the commit that it starts from. So the commits that count form one chain, walked back from the newest claim:
what a superseded group wrote after the base of its successor is never read, and no lock is needed.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import total_ordering

from pydantic import Field

from dsft_api.base import ApiModel
from dsft_api.layout import ATTEMPTS, CHECKPOINTS
from dsft_api.status import CheckpointRef, Metrics, Time

COMMIT_FILE = "COMMIT.json"
_NAME = re.compile(r"^step-(\d{8})-a(\d+)\.g(\d+)$")
_CLAIM = re.compile(r"^a(\d+)\.g(\d+)$")


@total_ordering
class ClaimId(ApiModel):
    """Attempt, and start of the worker group inside it, both counted from 1."""

    attempt: int
    group: int

    def __str__(self) -> str:
        return f"a{self.attempt}.g{self.group}"

    def __lt__(self, other: "ClaimId") -> bool:
        return (self.attempt, self.group) < (other.attempt, other.group)

    @property
    def key(self) -> str:
        """Where the claim is in the run's folder."""
        return f"{ATTEMPTS}/{self}.json"

    @staticmethod
    def parse(text: str) -> "ClaimId | None":
        """The id that `str` gave; None for other texts."""
        match = _CLAIM.match(text)
        return ClaimId(attempt=int(match[1]), group=int(match[2])) if match else None

    @staticmethod
    def from_key(key: str) -> "ClaimId | None":
        """The id of a claim's key; None for other keys."""
        folder, _, name = key.partition("/")
        return ClaimId.parse(name.removesuffix(".json")) if folder == ATTEMPTS and name.endswith(".json") else None


class Claim(ApiModel):
    """One start of a worker group: `attempts/a<n>.g<k>.json`, written once."""

    id: ClaimId
    base: str | None = Field(default=None, description="Name of the commit it starts from; None: from the beginning.")
    base_step: int = 0
    origin: str | None = Field(default=None, description="Checkpoint of another run that it starts from.")
    world_size: int
    start_time: datetime
    nonce: str = Field(description="Makes racing claims differ, so that a lost reply can be told from a lost race.")


class CommittedFile(ApiModel):
    """One file of a checkpoint."""

    path: str
    size: int
    sha256: str
    rank: int


class Patience(ApiModel):
    """What early stopping knows of the evaluations so far."""

    best: float = Field(description="The best value of the metric.")
    without: int = Field(description="Evaluations since then.")


class Commit(ApiModel):
    """COMMIT.json: written last, so its presence means that every file it lists is whole."""

    name: str
    claim: ClaimId
    step: int
    samples: int = Field(description="Global samples consumed: the sampler's whole position.")
    epoch: float
    world_size: int
    zero_stage: int
    precision: str
    spec_hash: str
    versions: dict[str, str]
    metrics: Metrics = Field(default_factory=dict[str, float])
    patience: Patience | None = None
    files: tuple[CommittedFile, ...]
    time: Time

    @property
    def folder(self) -> str:
        """Where its files are in the run's folder."""
        return f"{CHECKPOINTS}/{self.name}"

    @property
    def key(self) -> str:
        """Where COMMIT.json is in the run's folder."""
        return f"{self.folder}/{COMMIT_FILE}"

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files)

    def ref(self, prefix: str, digest: str) -> CheckpointRef:
        """The form that status and progress carry."""
        return CheckpointRef(
            uri=f"{prefix}/{CHECKPOINTS}/{self.name}",
            step=self.step,
            epoch=round(self.epoch, 4),
            world_size=self.world_size,
            bytes=self.bytes,
            time=self.time,
            metrics=self.metrics,
            digest=digest,
        )


def commit_name(step: int, claim: ClaimId) -> str:
    """Folder name of a checkpoint: `step-00000200-a2.g1`."""
    return f"step-{step:08d}-{claim}"


def parse_name(name: str) -> tuple[int, ClaimId] | None:
    """Step and claim of a folder name; None if it is no checkpoint's."""
    match = _NAME.match(name)
    return (int(match[1]), ClaimId(attempt=int(match[2]), group=int(match[3]))) if match else None


def lineage(names: Iterable[str], claims: Sequence[Claim]) -> list[str]:
    """The commits that count, oldest first.

    `names` are the folders that have a COMMIT.json, `claims` all claims of the run. Walks back from the newest claim:
    its own commits, then those of the claim its base belongs to, up to that base, and so on. A commit tells its claim by
    its name: it counts also where the claim's file was removed, by a rule that lets old objects expire, say.
    """
    by_claim: dict[ClaimId, list[tuple[int, str]]] = {}
    for name in names:
        parsed = parse_name(name)
        if parsed:
            by_claim.setdefault(parsed[1], []).append((parsed[0], name))
    by_id = {claim.id: claim for claim in claims}
    chain: list[tuple[int, str]] = []
    current = max({*by_id, *by_claim}, default=None)
    limit: int | None = None
    while current is not None:
        chain += [item for item in by_claim.get(current, []) if limit is None or item[0] <= limit]
        claim = by_id.get(current)
        parsed = parse_name(claim.base) if claim and claim.base else None
        # A base is always older than its claim: anything else is a damaged claim, and the chain ends there.
        if parsed is None or not parsed[1] < current:
            break
        limit, current = parsed
    # From the oldest claim on, so that of one step the commit of the older one comes first.
    chain.reverse()
    return [name for _, name in sorted(chain, key=lambda item: item[0])]


def next_claim(claims: Iterable[ClaimId], attempt: int) -> ClaimId:
    """The id that the next group start of an attempt claims."""
    groups = [claim.group for claim in claims if claim.attempt == attempt]
    return ClaimId(attempt=attempt, group=max(groups, default=0) + 1)


def best(commits: Iterable[Commit], metric: str, larger_is_better: bool) -> list[Commit]:
    """Commits that carry the metric, best first; of equals the older one."""
    scored = [commit for commit in commits if metric in commit.metrics]
    sign = -1.0 if larger_is_better else 1.0
    return sorted(scored, key=lambda commit: (sign * commit.metrics[metric], commit.step))


def superfluous(
    commits: Sequence[Commit], *, keep_last: int, keep_best: int, metric: str, larger_is_better: bool
) -> list[Commit]:
    """Commits that the retention policy lets go. The newest one never is."""
    newest = sorted(commits, key=lambda commit: commit.step)[-max(keep_last, 1) :]
    kept = {commit.name for commit in newest}
    kept |= {commit.name for commit in best(commits, metric, larger_is_better)[:keep_best]}
    return [commit for commit in commits if commit.name not in kept]
