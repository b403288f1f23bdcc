"""DeepSpeed ZeRO-3 as its documentation shows it, without any of dsft: what the trainer's losses are compared with.

Run by torchrun, with DS_ACCELERATOR=cpu: MODEL BATCHES OUT SETTINGS. Each rank reads BATCHES/<step>-<rank>.pt, a dict with
`weight`, what the whole global batch counts, and `micro`, its micro-batches; rank 0 writes the loss of each step to OUT.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def main(model_folder: str, batches: str, out: str, settings: str) -> None:
    torch.set_num_threads(1)
    # Else init_distributed compiles an op for inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config, adamw = json.loads(settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weight_decay = adamw.pop("weight_decay")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, **adamw, fused=True), config=config
    )
    assert engine.zero_optimization_stage() == 3
    losses = []
    for step in range(len(list(Path(batches).glob(f"*-{rank}.pt")))):
        batch = torch.load(Path(batches) / f"{step}-{rank}.pt")
        total = torch.zeros((), dtype=torch.float64)
        for micro in batch["micro"]:
            logits = engine(input_ids=micro["input_ids"], attention_mask=micro["attention_mask"]).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum")
            # backward() divides by the micro-batches, and averages over the ranks.
            engine.backward(loss * (world_size * len(batch["micro"]) / batch["weight"]))
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / batch["weight"])
    if rank == 0:
        Path(out).write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
