"""For `accelerate.Accelerator` under spec.program: its saved state as a checkpoint of the run, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dsft_trainer import context
from dsft_trainer.integrations import last_checkpoint, release_checkpoint, report_shared, shared_folder

_STEP = "dsft-step"


def load(accelerator: Accelerator) -> int:
    """Load the newest checkpoint, after `prepare`; the step that it was saved at, 0 if there is none. Collective."""
    folder = last_checkpoint()
    if folder is None:
        return 0
    accelerator.load_state(folder)
    step = int((Path(folder) / _STEP).read_text())
    release_checkpoint()
    return step


def save(accelerator: Accelerator, step: int, every: int, metrics: Mapping[str, Any]) -> bool:
    """Report a checkpoint at each `every`-th step, and one when the run shall stop; whether it shall.

    Collective: call it at every step.
    """
    stops = context.drain_requested()
    if stops or step % every == 0:
        folder = shared_folder(step)
        accelerator.save_state(str(folder))
        (folder / _STEP).write_text(str(step))
        report_shared(folder, {**metrics, "step": step})
    return stops
