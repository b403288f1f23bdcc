"""Which checkpoints count, and which are kept: the lineage of claims and commits, as tables and as histories."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsft_trainer.checkpoint.commits import (
    Claim,
    ClaimId,
    Commit,
    best,
    commit_name,
    lineage,
    next_claim,
    parse_name,
    superfluous,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def claim_id(text: str) -> ClaimId:
    attempt, group = text.removeprefix("a").split(".g")
    return ClaimId(attempt=int(attempt), group=int(group))


def claim(text: str, base: str | None = None) -> Claim:
    parsed = parse_name(base) if base else None
    return Claim(
        id=claim_id(text), base=base, base_step=parsed[0] if parsed else 0, world_size=2, start_time=NOON, nonce=text
    )


def at(step: int, of: str) -> str:
    return commit_name(step, claim_id(of))


def commit(step: int, loss: float | None = None) -> Commit:
    owner = claim_id("a1.g1")
    return Commit(
        name=commit_name(step, owner),
        claim=owner,
        step=step,
        samples=8 * step,
        epoch=step / 10,
        world_size=2,
        zero_stage=3,
        precision="fp32",
        spec_hash="sha256:0",
        versions={},
        metrics={} if loss is None else {"loss": loss},
        files=(),
        time=NOON,
    )


@pytest.mark.parametrize(
    ("names", "claims", "expected"),
    [
        pytest.param([], [], [], id="nothing yet"),
        pytest.param([], [claim("a1.g1")], [], id="claimed, nothing committed"),
        pytest.param(
            [at(20, "a1.g1"), at(10, "a1.g1")],
            [claim("a1.g1")],
            [at(10, "a1.g1"), at(20, "a1.g1")],
            id="one start: all its commits, oldest first",
        ),
        pytest.param(
            [at(10, "a1.g1"), at(20, "a2.g1")],
            [claim("a1.g1"), claim("a2.g1", at(10, "a1.g1"))],
            [at(10, "a1.g1"), at(20, "a2.g1")],
            id="a second attempt adds to the first",
        ),
        pytest.param(
            [at(10, "a1.g1"), at(20, "a1.g1"), at(20, "a2.g1")],
            [claim("a1.g1"), claim("a2.g1", at(10, "a1.g1"))],
            [at(10, "a1.g1"), at(20, "a2.g1")],
            id="what a zombie wrote after its successor's base does not count",
        ),
        pytest.param(
            [at(10, "a1.g1"), at(20, "a1.g1")],
            [claim("a1.g1"), claim("a1.g2", at(10, "a1.g1"))],
            [at(10, "a1.g1")],
            id="not even before the successor commits",
        ),
        pytest.param(
            [at(10, "a1.g1"), at(10, "a2.g1")],
            [claim("a1.g1"), claim("a2.g1")],
            [at(10, "a2.g1")],
            id="a successor that began anew leaves all behind",
        ),
        pytest.param(
            [at(20, "a2.g1")],
            [claim("a1.g1"), claim("a2.g1", at(10, "a1.g1"))],
            [at(20, "a2.g1")],
            id="the base itself was retired",
        ),
        pytest.param(
            [at(10, "a1.g1")],
            [claim("a1.g1"), claim("a2.g1", at(10, "a1.g1")), claim("a3.g1", at(10, "a1.g1"))],
            [at(10, "a1.g1")],
            id="starts that died at once pass their base on",
        ),
        pytest.param(
            [at(10, "a9.g1"), at(20, "a10.g1")],
            [claim("a9.g1"), claim("a10.g1", at(10, "a9.g1"))],
            [at(10, "a9.g1"), at(20, "a10.g1")],
            id="attempts are numbers, not text",
        ),
        pytest.param(
            [at(10, "a9.g1"), at(10, "a10.g1")],
            [claim("a9.g1"), claim("a10.g1", at(10, "a9.g1"))],
            [at(10, "a9.g1"), at(10, "a10.g1")],
            id="a successor that only evaluates its base commits the same step",
        ),
        pytest.param(
            [at(10, "a1.g1")],
            [claim("a1.g1", at(10, "a1.g1"))],
            [at(10, "a1.g1")],
            id="a damaged claim that names itself as base ends the chain",
        ),
        pytest.param(
            ["step-00000010", "best", at(10, "a1.g1")],
            [claim("a1.g1")],
            [at(10, "a1.g1")],
            id="foreign folders do not count",
        ),
        pytest.param([at(10, "a1.g1")], [], [at(10, "a1.g1")], id="a claim that is gone is known by its commits"),
        pytest.param(
            [at(10, "a1.g1"), at(20, "a2.g1")],
            [claim("a1.g1")],
            [at(20, "a2.g1")],
            id="the newest claim that is gone: what it went on from is not known",
        ),
    ],
)
def test_lineage(names: list[str], claims: list[Claim], expected: list[str]) -> None:
    assert lineage(names, claims) == expected


@dataclass
class History:
    """What group starts do to storage. Each commit remembers the one before it: the chain as a linked list."""

    claims: list[Claim] = field(default_factory=list)
    before: dict[str, str | None] = field(default_factory=dict)
    head: dict[ClaimId, str | None] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def present(self) -> list[str]:
        return [name for name in self.before if name not in self.deleted]

    def chain(self) -> list[str]:
        """From the newest claim's head backwards."""
        name = self.head[self.claims[-1].id] if self.claims else None
        names: list[str] = []
        while name is not None:
            names.append(name)
            name = self.before[name]
        return [name for name in reversed(names) if name not in self.deleted]

    def start(self, new_attempt: bool, passed_over: int) -> None:
        """A new group start; `passed_over` newest commits did not match their checksums."""
        chain = lineage(self.present(), self.claims)
        usable = chain[: max(0, len(chain) - passed_over)]
        base = usable[-1] if usable else None
        attempt = self.claims[-1].id.attempt + new_attempt if self.claims else 1
        new = next_claim((known.id for known in self.claims), attempt)
        self.claims.append(claim(str(new), base))
        self.head[new] = base

    def commit(self, which: int, steps: int) -> None:
        """One of the starts commits, be it superseded or not."""
        owner = self.claims[which % len(self.claims)].id
        head = self.head[owner]
        parsed = parse_name(head) if head else None
        name = commit_name((parsed[0] if parsed else 0) + steps, owner)
        self.before[name] = head
        self.head[owner] = name

    def retire(self, which: int) -> None:
        """One of the commits that count goes, but never the newest."""
        candidates = self.chain()[:-1]
        if candidates:
            self.deleted.add(candidates[which % len(candidates)])


EVENTS = st.one_of(
    st.tuples(st.just("start"), st.booleans(), st.integers(0, 2)),
    st.tuples(st.just("commit"), st.integers(0, 5), st.integers(1, 4)),
    st.tuples(st.just("retire"), st.integers(0, 5)),
)


@given(st.lists(EVENTS, max_size=40), st.randoms())
def test_the_chain_survives_zombies_fallbacks_and_retirement(events: list[tuple], chance) -> None:
    history = History()
    history.start(new_attempt=True, passed_over=0)
    for name, *arguments in events:
        getattr(history, name)(*arguments)
        names, claims = history.present(), list(history.claims)
        chance.shuffle(names)
        chance.shuffle(claims)
        assert lineage(names, claims) == history.chain()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step-00000200-a2.g1", (200, ClaimId(attempt=2, group=1))),
        ("step-00000200-a12.g34", (200, ClaimId(attempt=12, group=34))),
        ("step-200-a2.g1", None),
        ("step-00000200-a2.g1.tmp", None),
        ("step-00000200", None),
    ],
)
def test_names(name: str, expected: tuple[int, ClaimId] | None) -> None:
    assert parse_name(name) == expected
    if expected is not None:
        assert commit_name(*expected) == name


def test_claims_count_groups_within_an_attempt() -> None:
    known = [claim_id("a1.g1"), claim_id("a1.g2"), claim_id("a2.g1")]
    assert next_claim(known, 1) == claim_id("a1.g3")
    assert next_claim(known, 3) == claim_id("a3.g1")
    assert max(claim_id("a9.g9"), claim_id("a10.g1")) == claim_id("a10.g1")
    assert ClaimId.from_key(claim_id("a10.g2").key) == claim_id("a10.g2")
    assert ClaimId.from_key("attempts/notes.txt") is None


@pytest.mark.parametrize(
    ("losses", "keep_last", "keep_best", "larger_is_better", "kept"),
    [
        pytest.param({1: None, 2: None, 3: None}, 2, 0, False, {2, 3}, id="the last two"),
        pytest.param({1: None, 2: None, 3: None}, 2, 1, False, {2, 3}, id="no metric, no best"),
        pytest.param({1: 0.1, 2: 0.3, 3: 0.2}, 1, 1, False, {1, 3}, id="the smallest loss"),
        pytest.param({1: 0.1, 2: 0.3, 3: 0.2}, 1, 1, True, {2, 3}, id="the largest score"),
        pytest.param({1: 0.1, 2: 0.3, 3: 0.2}, 1, 2, False, {1, 3}, id="the last one may be among the best"),
        pytest.param({1: 0.1, 2: 0.1, 3: 0.2}, 1, 1, False, {1, 3}, id="of equals the older one"),
        pytest.param({1: 0.1, 2: None, 3: None}, 1, 1, False, {1, 3}, id="those without an evaluation are not best"),
        pytest.param({1: None}, 2, 1, False, {1}, id="fewer than may be kept"),
        pytest.param({}, 2, 1, False, set(), id="none"),
    ],
)
def test_retention(
    losses: dict[int, float | None], keep_last: int, keep_best: int, larger_is_better: bool, kept: set[int]
) -> None:
    commits = [commit(step, loss) for step, loss in losses.items()]
    gone = superfluous(
        commits, keep_last=keep_last, keep_best=keep_best, metric="loss", larger_is_better=larger_is_better
    )
    assert losses.keys() - steps(gone) == kept


@given(
    st.dictionaries(st.integers(1, 50), st.none() | st.sampled_from([0.1, 0.2, 0.3]), min_size=1),
    st.integers(1, 5),
    st.integers(0, 3),
    st.booleans(),
)
def test_retention_keeps_the_newest_and_the_best(
    losses: dict[int, float | None], keep_last: int, keep_best: int, larger_is_better: bool
) -> None:
    commits = [commit(step, loss) for step, loss in losses.items()]
    gone = steps(
        superfluous(commits, keep_last=keep_last, keep_best=keep_best, metric="loss", larger_is_better=larger_is_better)
    )
    assert max(losses) not in gone
    assert len(losses) - len(gone) <= keep_last + keep_best
    if keep_best:
        assert not gone & steps(best(commits, "loss", larger_is_better)[:1])
    # Applying it once more to what is left changes nothing.
    left = [kept for kept in commits if kept.step not in gone]
    again = superfluous(
        left, keep_last=keep_last, keep_best=keep_best, metric="loss", larger_is_better=larger_is_better
    )
    assert again == []


def steps(commits: Iterable[Commit]) -> set[int]:
    return {known.step for known in commits}
