"""Reads the checkpoints of a run: claims, commits and what status shows of them. Needs no torch, so the CLI can use it."""

import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from dsft_api.conditions import FailureClass
from dsft_api.layout import ATTEMPTS, CHECKPOINTS
from dsft_api.status import MAX_RETAINED, CheckpointRef, Checkpoints
from dsft_trainer.checkpoint.commits import COMMIT_FILE, Claim, ClaimId, Commit, best, lineage, next_claim
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which commits are kept."""

    keep_last: int
    keep_best: int
    metric: str
    larger_is_better: bool


def read_claims(store: Store) -> list[Claim]:
    """All claims of a run, oldest first. Damaged ones are left out, with a warning."""
    claims = []
    for entry in store.list(f"{ATTEMPTS}/"):
        if ClaimId.from_key(entry.key):
            try:
                claims.append(Claim.model_validate_json(store.get_bytes(entry.key) or b""))
            except ValidationError as error:
                log.warning("%s is no claim and is left out: %s", entry.key, error)
    return sorted(claims, key=lambda claim: claim.id)


def claimed_ids(store: Store) -> list[ClaimId]:
    """The ids that are taken, also by damaged claims."""
    ids = (ClaimId.from_key(entry.key) for entry in store.list(f"{ATTEMPTS}/"))
    return [claim for claim in ids if claim is not None]


def superseding(store: Store, claim: ClaimId) -> ClaimId | None:
    """The newest start that has taken the run over from this one, if any has."""
    newest = max(claimed_ids(store), default=claim)
    return newest if newest > claim else None


def taken_over(claim: ClaimId, by: ClaimId) -> TrainerError:
    """The end of a start that another one has superseded, perhaps while it was frozen: what it writes nobody reads."""
    return TrainerError(
        FailureClass.HEAD_LOST,
        f"{by} has taken this run over from {claim}, which stops without a commit",
    )


def make_claim(
    store: Store, attempt: int, base: Commit | None, world_size: int, *, origin: str | None = None, origin_step: int = 0
) -> ClaimId:
    """Claim the next group start of an attempt; it goes on from `base`, or from the checkpoint `origin` of another run."""
    # The claim of the base may be gone from storage, and is taken all the same.
    known = [base.claim] if base else []
    while True:
        claim = Claim(
            id=next_claim([*known, *claimed_ids(store)], attempt),
            base=base.name if base else None,
            base_step=base.step if base else origin_step,
            origin=origin,
            world_size=world_size,
            start_time=datetime.now(UTC),
            nonce=uuid.uuid4().hex,
        )
        if store.put_bytes(claim.id.key, claim.model_dump_json(by_alias=True).encode(), if_absent=True):
            return claim.id


def read_commits(store: Store) -> list[Commit]:
    """The commits that count, oldest first (see `commits.lineage`). Damaged manifests are left out, with a warning."""
    names = [
        entry.key.split("/")[1] for entry in store.list(f"{CHECKPOINTS}/") if entry.key.endswith(f"/{COMMIT_FILE}")
    ]
    commits = []
    for name in lineage(names, read_claims(store)):
        try:
            commits.append(Commit.model_validate_json(store.get_bytes(f"{CHECKPOINTS}/{name}/{COMMIT_FILE}") or b""))
        except ValidationError as error:
            log.warning("checkpoint %s has a damaged %s and is left out: %s", name, COMMIT_FILE, error)
    return commits


def references(prefix: str, commits: Sequence[Commit], retention: Retention) -> Checkpoints:
    """The commits as status shows them: the newest ones, where some could not be deleted."""

    def ref(commit: Commit) -> CheckpointRef:
        return commit.ref(prefix, "sha256:" + hashlib.sha256(manifest(commit)).hexdigest())

    ranked = best(commits, retention.metric, retention.larger_is_better)
    return Checkpoints(
        latest=ref(commits[-1]) if commits else None,
        best=ref(ranked[0]) if ranked else None,
        retained=tuple(ref(commit) for commit in commits[-MAX_RETAINED:]),
    )


def manifest(commit: Commit) -> bytes:
    """The bytes of COMMIT.json, whose digest names the checkpoint."""
    return commit.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode()
