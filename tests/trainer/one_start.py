"""Ranks that train several jobs one after another, so that the imports are paid for once. Started by torchrun on a folder.

Each FOLDER/NAME/job.json is one job; what became of it is in its storage, and in FOLDER/NAME if it failed.
"""

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dsft_api.job import Job
from dsft_trainer.errors import TrainerError
from dsft_trainer.process import prepare_process
from dsft_trainer.progress import starting
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.runtime.torchrun import TorchrunRuntime


def main(folder: Path) -> None:
    """Train them in the order of their names; a job that fails does not keep the next ones from starting."""
    jobs = {path.parent: Job.model_validate_json(path.read_text()) for path in sorted(folder.glob("*/job.json"))}
    prepare_process(next(iter(jobs.values())))
    from dsft_trainer.rank import run_rank

    dist.init_process_group("gloo")
    for place, job in jobs.items():
        try:
            run_rank(job, TorchrunRuntime(Channel(place), starting(job)), torch.device("cpu"))
        except TrainerError:
            logging.getLogger(__name__).exception("%s failed", place.name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
