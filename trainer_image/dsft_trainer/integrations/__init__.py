"""For frameworks under spec.program: their checkpoints become those of the run. Optional, and public: programs import these.

All ranks of a node save into one folder, as these frameworks expect it, and the node's first rank hands it to Ray Train: each
shard goes to storage once, from whichever node it is on. Each module needs its framework, which the others don't.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_copies: set[str] = set()


def last_checkpoint() -> str | None:
    """The newest checkpoint as a folder, which must not be written to; None at the beginning.

    What had to be fetched stays on the node until `release_checkpoint`.
    """
    import pyarrow.fs
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    if isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem):
        return checkpoint.path
    copy = checkpoint.to_directory()
    _copies.add(copy)
    return copy


def release_checkpoint() -> None:
    """Remove what `last_checkpoint` fetched, once all ranks have read it. Collective."""
    _barrier()
    while _copies:
        shutil.rmtree(_copies.pop(), ignore_errors=True)


def shared_folder(step: int) -> Path:
    """Where all ranks of a node save the checkpoint of a step."""
    # The port tells the starts of the ranks apart, and runs on one machine.
    start = f"{os.getuid()}-{os.environ.get('MASTER_PORT', '0')}"
    return Path(os.environ.get("DSFT_SCRATCH", tempfile.gettempdir())) / f"dsft-program-{start}" / f"step-{step}"


def report_shared(folder: Path, metrics: Mapping[str, Any]) -> None:
    """`ray.train.report` of a folder that all ranks of each node saved into, which is removed from the node then. Collective."""
    import ray.train

    # Another rank may still be writing.
    _barrier()
    is_first = ray.train.get_context().get_local_rank() == 0
    ray.train.report(dict(metrics), checkpoint=ray.train.Checkpoint.from_directory(folder) if is_first else None)
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
