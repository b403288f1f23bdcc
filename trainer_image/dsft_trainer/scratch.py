"""The folder of an attempt on a node: what is fetched, tokenised, staged and exported lies there, and goes with the ranks."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft_api.job import Job


@contextmanager
def node_scratch(job: Job) -> Iterator[Path]:
    """A folder of this attempt on this node, the same for all its ranks, gone afterwards."""
    folder = scratch_folder(job)
    for killed in folder.parent.glob(f"{_run(job)}*"):
        if killed != folder:
            shutil.rmtree(killed, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folder(job: Job) -> Path:
    """Where it is, known once the ranks' rendezvous is."""
    root = Path(os.environ.get("DSFT_SCRATCH", tempfile.gettempdir()))
    # The port tells the starts of the worker group apart: all ranks of one start see the same.
    return root / f"{_run(job)}a{job.attempt}-{os.environ.get('MASTER_PORT', '0')}"


def _run(job: Job) -> str:
    # Equal manifests have equal uids here, whatever storage they run in: keep their folders apart.
    where = hashlib.sha256(job.storage_prefix.encode()).hexdigest()[:8]
    return f"dsft-{job.run.uid}-{where}-"
