"""What was ever seen committed in one run, and that none of it is lost.

A commit is seen where it counts: in the lineage that storage shows, or in what the trainer told. From then on it is whole, and it
goes only when retention lets it go.
"""

from dataclasses import dataclass, field

from dsft_trainer.checkpoint.commits import ClaimId, Commit, superfluous
from dsft_trainer.checkpoint.listing import read_commits
from tests.trainer.runs import Run


@dataclass
class Ledger:
    """Of one run."""

    run: Run
    keep_last: int
    keep_best: int
    seen: dict[str, Commit] = field(default_factory=dict)

    def hear(self) -> None:
        """Take down what the trainer tells."""
        told = self.run.told()
        for ref in told.checkpoints.retained if told is not None and told.checkpoints is not None else ():
            name = ref.uri.rpartition("/")[2]
            # What retention decides by, and no more.
            self.seen.setdefault(name, Commit.model_construct(name=name, step=ref.step, metrics=ref.metrics))

    def look(self) -> list[Commit]:
        """The commits that count, oldest first; everything that was seen is among them, or is superfluous, and all is whole."""
        before = dict(self.seen)
        commits = read_commits(self.run.store)
        self.seen |= {commit.name: commit for commit in commits}
        gone = superfluous(
            list(self.seen.values()),
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            metric="loss",
            larger_is_better=False,
        )
        lost = before.keys() - {commit.name for commit in commits} - {commit.name for commit in gone}
        assert not lost, f"committed and lost: {sorted(lost)}; there are {[commit.name for commit in commits]}"
        self.run.assert_commits_whole()
        return commits

    def newest(self, until: ClaimId) -> int:
        """The step of the newest one by this claim or an older one; 0 if there is none."""
        return max((commit.step for commit in self.look() if not commit.claim > until), default=0)
