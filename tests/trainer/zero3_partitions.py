"""What DeepSpeed made of the model on each rank, when the trainer builds its engine. Run by torchrun: JOB OUT.

Each rank writes OUT/<rank>.json: the engine's class and stage, and for each parameter its name, whole size and own share.
"""

import json
import os
import sys
from pathlib import Path

from dsft_api.batch import plan_batch
from dsft_api.job import Job
from dsft_trainer.process import prepare_process


def main(job_file: str, out: str) -> None:
    job = Job.model_validate_json(Path(job_file).read_text())
    prepare_process(job)
    import torch
    import torch.distributed as dist

    from dsft_trainer.engine import deepspeed_config, start_engine
    from dsft_trainer.model import load_model

    dist.init_process_group("gloo")
    work = job.spec.workload()
    training = work.training
    plan = plan_batch(training.global_batch_size, dist.get_world_size(), job.spec.execution.micro_batch_size)
    config = deepspeed_config(job.spec, plan)
    model = load_model(
        work.model,
        Path(work.model.uri.removeprefix("file://")),
        config,
        precision=training.precision,
        attention=job.spec.execution.attention,
        activation_checkpointing=False,
        pad_token_id=0,
    )
    engine = start_engine(model, config, training.optimizer, training.schedule, 10, torch.device("cpu")).deepspeed
    parameters = [
        {
            "name": name,
            "has_ds_id": hasattr(p, "ds_id"),
            "here": p.numel(),
            "whole": p.ds_numel,
            "share": p.ds_tensor.numel(),
        }
        for name, p in model.named_parameters()
    ]
    facts = {"class": type(engine).__name__, "stage": engine.zero_optimization_stage(), "parameters": parameters}
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
