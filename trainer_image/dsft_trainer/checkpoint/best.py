"""The weights of the best checkpoint, for the export of a run that stops early. Read on one rank, from all ranks' shards.

DeepSpeed puts a model together from a checkpoint of any number of ranks without an engine: what is trained comes from the fp32
weights, and is cut to the run's precision as the optimizer's step does it.
"""

import logging
import shutil
from pathlib import Path

import torch

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.checkpointer import Checkpointer
from dsft_trainer.checkpoint.commits import Commit, best
from dsft_trainer.checkpoint.files import fetch
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)


def best_commit(checkpointer: Checkpointer) -> Commit:
    """The best commit by the run's metric; the last one, if none was evaluated."""
    policy = checkpointer.retention
    ranked = best(checkpointer.commits, policy.metric, policy.larger_is_better)
    return ranked[0] if ranked else checkpointer.commits[-1]


def weights_of(store: Store, commit: Commit, folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All weights of a commit, on this rank's CPU. `folder` is used for the shards, and removed.

    Raises:
        TrainerError: Unknown if a file does not match its checksum.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    log.info("the export is that of checkpoint %s, the best one", commit.name)
    try:
        if not fetch(store, commit.folder, commit.files, folder / commit.name):
            raise TrainerError(
                FailureClass.UNKNOWN, f"the best checkpoint, {commit.name}, does not match its checksums"
            )
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=commit.name)
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
