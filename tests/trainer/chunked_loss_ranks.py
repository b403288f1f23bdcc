"""Loss and gradients by whole logits and by chunks, under ZeRO-3. Run by torchrun: JOB OUT MODEL...

Rank 0 writes OUT/<name of the model>.json: both losses, and for each parameter the largest gradient and the largest difference.
"""

import json
import sys
from pathlib import Path
from typing import Any

from dsft_api.batch import plan_batch
from dsft_api.job import Job
from dsft_trainer.process import prepare_process

LENGTHS = (24, 9)


def main(job_file: str, out: str, *folders: str) -> None:
    job = Job.model_validate_json(Path(job_file).read_text())
    prepare_process(job)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for folder in map(Path, folders):
        whole, by_chunks = (loss_and_gradients(job, folder, kernel) for kernel in ("standard", "chunked"))
        differences = {
            name: (float(gradient.abs().max()), float((gradient - by_chunks[1][name]).abs().max()))
            for name, gradient in whole[1].items()
        }
        facts = {"losses": [whole[0], by_chunks[0]], "gradients": differences}
        if dist.get_rank() == 0:
            (Path(out) / f"{folder.name}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def loss_and_gradients(job: Job, folder: Path, kernel: Any) -> tuple[list[float], dict[str, Any]]:
    """The loss of each of two micro-batches on this rank, and the gradients of both over all ranks."""
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from dsft_trainer import chunked_loss
    from dsft_trainer.data.collate import Batch
    from dsft_trainer.data.tokens import IGNORED
    from dsft_trainer.engine import deepspeed_config, start_engine
    from dsft_trainer.losses import batch_loss
    from dsft_trainer.model import load_model
    from dsft_trainer.model_checks import check_model

    chunked_loss.chunk_tokens = lambda vocabulary: 5
    spec = job.spec.model_copy(update={"execution": job.spec.execution.model_copy(update={"loss_kernel": kernel})})
    work = spec.workload()
    config = deepspeed_config(spec, plan_batch(2 * 2 * len(LENGTHS), dist.get_world_size(), 2))
    model = load_model(
        work.model,
        folder,
        config,
        precision="fp32",
        attention="sdpa",
        activation_checkpointing=True,
        loss_kernel=kernel,
        pad_token_id=0,
    )
    engine = start_engine(model, config, work.training.optimizer, work.training.schedule, 10, torch.device("cpu"))
    check_model(spec, engine, model)
    engine.train()
    loss_of = batch_loss(engine, "causal-lm", kernel)
    losses = []
    for number, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + number)
        ids = torch.randint(3, 512, (2, length), generator=generator)
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, IGNORED, ids)
        if number == 1 and dist.get_rank() == 1:
            # A micro-batch without a target: its rank has the same collectives to take part in.
            labels[:] = IGNORED
        batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, 1, 1)
        loss = loss_of(batch)
        engine.backward(loss)
        losses.append(float(loss.detach()))
        if number + 1 < len(LENGTHS):
            engine.micro_step()
    return losses, {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    main(*sys.argv[1:])
