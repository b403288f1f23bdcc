"""Early stopping: a function of the evaluations so far. What it must know of them travels with each commit.

So a run that is started again stops where it would have stopped: evaluations after the commit are done again, and those before
it are in `Patience`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dsft_api.spec.identity import EvaluationSpec
from dsft_trainer.checkpoint.commits import Patience


def after(patience: Patience | None, value: float, evaluation: EvaluationSpec) -> Patience:
    """What is known after an evaluation that gave `value`; better by no more than minDelta is not better."""
    policy = evaluation.early_stopping
    if patience is None or policy is None:
        return Patience(best=value, without=0)
    gain = value - patience.best if evaluation.larger_is_better else patience.best - value
    return (
        Patience(best=value, without=0)
        if gain > policy.min_delta
        else Patience(best=patience.best, without=patience.without + 1)
    )


@dataclass
class Stopper:
    """Watches the evaluations of a run. Without `earlyStopping` it never stops."""

    evaluation: EvaluationSpec
    patience: Patience | None = None

    def see(self, metrics: Mapping[str, float]) -> None:
        """Take one evaluation."""
        if self.evaluation.early_stopping is not None and self.evaluation.metric in metrics:
            self.patience = after(self.patience, metrics[self.evaluation.metric], self.evaluation)

    @property
    def stop(self) -> bool:
        """Whether as many evaluations as `patience` were no better."""
        policy = self.evaluation.early_stopping
        return policy is not None and self.patience is not None and self.patience.without >= policy.patience

    def message(self, step: int, total_steps: int) -> str:
        """How the training ended."""
        if not self.stop or self.patience is None or step == total_steps:
            return "done"
        was = f"{self.evaluation.metric} was not better than {self.patience.best:.6g} in {self.patience.without} evaluations"
        return f"stopped early at step {step} of {total_steps}: {was}"
