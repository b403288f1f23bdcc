"""For `transformers.Trainer` under spec.program: a callback that reports what it saves, and ends it when the run is drained."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dsft_trainer import context
from dsft_trainer.integrations import last_checkpoint, release_checkpoint, report_shared

__all__ = ["ReportCallback", "last_checkpoint"]


class ReportCallback(TrainerCallback):
    """Makes each checkpoint of the Trainer one of the run, with the last value of each metric that was logged.

    It is removed from `output_dir` then, so `load_best_model_at_end` finds none. When the run is drained, the Trainer saves after
    its step and ends.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any) -> None:  # noqa: ARG002
        """On all ranks, when each has written its part."""
        logged: dict[str, Any] = {name: value for entry in state.log_history for name, value in entry.items()}
        metrics = logged | {"step": state.global_step, "total_steps": state.max_steps, "epoch": state.epoch}
        report_shared(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", metrics)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_kwargs: Any,
    ) -> None:
        """On all ranks, after each optimizer step."""
        if context.drain_requested():
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_kwargs: Any,
    ) -> None:
        """On all ranks."""
        release_checkpoint()
