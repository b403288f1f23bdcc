"""What must be set in a rank's process before torch's and DeepSpeed's first work: accelerator, threads, no compiler."""

import logging
import os
import warnings
from typing import TYPE_CHECKING

from dsft_api.job import Job
from dsft_trainer.scratch import scratch_folder

if TYPE_CHECKING:
    import torch


def start_environment(job: Job) -> dict[str, str]:
    """What a rank's process must find when it starts: glibc reads it before Python runs.

    ZeRO-3 allocates and frees whole layers in each step. On CPU glibc would map and unmap them every time, at the price of
    page faults: measured 10 to 15 % of a step.
    """
    if job.ranks.device == "cuda":
        return {}
    return {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def rank_environment(job: Job) -> dict[str, str]:
    """What torch, DeepSpeed and tokenizers read from the environment when they are imported."""
    return {
        "DS_ACCELERATOR": job.ranks.device,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(job.ranks.threads),
    }


def prepare_process(job: Job) -> None:
    """Pin device and threads of this process. Call before deepspeed is imported, or with `rank_environment` in place."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s rank=" + os.environ.get("RANK", "?") + " %(message)s",
    )
    for talkative in ("DeepSpeed", "botocore"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.update(rank_environment(job))
    if job.spec.model is not None and job.spec.model.trust_remote_code:
        # transformers copies a model's code, looks at it and imports it later: where no other process writes.
        os.environ["HF_MODULES_CACHE"] = str(scratch_folder(job) / f"model-code-{os.environ['RANK']}")
    import torch

    torch.set_num_threads(job.ranks.threads)
    if job.ranks.device == "cpu":
        from dsft_trainer.engine import without_compiled_ops

        without_compiled_ops()


def torch_device(job: Job, local_rank: int) -> "torch.device":
    """This rank's device, made current."""
    import torch

    if job.ranks.device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
