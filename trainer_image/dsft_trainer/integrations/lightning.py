"""For `lightning.Trainer` under spec.program: a callback that reports a checkpoint per epoch, and one when it is asked to stop.

Ray's own callback gives each rank a folder, while the DeepSpeed strategy saves into rank 0's: on several nodes shards would be
missing.
"""

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from dsft_trainer import context
from dsft_trainer.integrations import last_checkpoint, release_checkpoint, report_shared, shared_folder

__all__ = ["ReportCallback", "last_checkpoint"]


class ReportCallback(Callback):
    """Makes a checkpoint of the run at the end of each epoch, with the metrics that the module logged.

    When the run is drained, one is made after the batch. Lightning then goes on inside the epoch, but with a DataLoader that
    begins anew, unless it keeps its state.
    """

    def __init__(self) -> None:
        self._drained = False

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """On all ranks."""
        # On every rank, also where another callback has stopped it already.
        if context.drain_requested() and not self._drained:
            _report(trainer, trainer.current_epoch)
            self._drained = trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """On all ranks."""
        if not self._drained:
            _report(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        """On all ranks."""
        release_checkpoint()


def _report(trainer: lightning.Trainer, epochs: int) -> None:
    step = trainer.global_step
    folder = shared_folder(step)
    trainer.save_checkpoint(folder)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    metrics |= {"step": step, "total_steps": int(trainer.estimated_stepping_batches), "epoch": epochs}
    report_shared(folder, metrics)
