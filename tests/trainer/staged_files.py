"""Whether a staged checkpoint is what DeepSpeed itself writes. Run by torchrun: JOB OUT.

Each rank trains a step, has DeepSpeed save, stages, trains another step, and writes what it staged. OUT/<rank>.json names the
files of both, and every place where their contents differ.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dsft_api.batch import plan_batch
from dsft_api.job import Job
from dsft_trainer.process import prepare_process


def same(left: Any, right: Any) -> bool:
    """Whether two leaves are equal, every bit of every tensor."""
    import torch

    if isinstance(left, torch.Tensor):
        kinds = [(tensor.dtype, tensor.shape, tensor.requires_grad) for tensor in (left, right)]
        return kinds[0] == kinds[1] and torch.equal(left, right)
    return np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right


def differences(left: Any, right: Any, place: str) -> Iterator[str]:
    """Where two loaded files are not the same."""
    if type(left) is not type(right):
        yield f"{place}: {type(left)} is not {type(right)}"
    elif isinstance(left, Mapping):
        if list(left) != list(right):
            yield f"{place}: {list(left)} are not {list(right)}"
        for key in left:
            yield from differences(left[key], right.get(key), f"{place}.{key}")
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            yield f"{place}: {len(left)} items are not {len(right)}"
        for number, (one, other) in enumerate(zip(left, right, strict=False)):
            yield from differences(one, other, f"{place}[{number}]")
    elif type(left).__module__.startswith("deepspeed") and not isinstance(left, type | Enum):
        # A loss scaler, say.
        yield from differences(vars(left), vars(right), place)
    elif not same(left, right):
        yield f"{place}: {left!r} is not {right!r}"


def main(job_file: str, out: str) -> None:
    job = Job.model_validate_json(Path(job_file).read_text())
    prepare_process(job)
    import torch
    import torch.distributed as dist

    from dsft_trainer.engine import deepspeed_config, start_engine
    from dsft_trainer.model import load_model

    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    training = job.spec.workload().training
    plan = plan_batch(training.global_batch_size, dist.get_world_size(), training.global_batch_size // 2)
    config = deepspeed_config(job.spec, plan)
    model = load_model(
        job.spec.workload().model,
        Path(job.spec.workload().model.uri.removeprefix("file://")),
        config,
        precision=training.precision,
        attention=job.spec.execution.attention,
        activation_checkpointing=False,
        pad_token_id=0,
    )
    engine = start_engine(model, config, training.optimizer, training.schedule, 10, torch.device("cpu"))

    def train() -> None:
        tokens = torch.randint(5, 500, (2, 16))
        engine.backward(
            engine.forward({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).square().mean()
        )
        engine.step()

    folders = [Path(out) / f"{way}-{rank}" for way in ("deepspeed", "staged")]
    facts: list[str] = []
    for round_ in range(2):  # The second one overwrites the memory of the first.
        train()
        (folders[0] / "tag").mkdir(parents=True, exist_ok=True)
        engine.deepspeed.save_checkpoint(str(folders[0]), tag="tag", save_latest=False)
        torch.save(engine.rng_state(), folders[0] / "tag" / f"rng-{rank}.pt")
        staged = engine.stage(Path(out) / f"scratch-{rank}", "tag")
        train()
        staged.write(folders[1] / "tag")
        names = [sorted(path.name for path in (folder / "tag").iterdir()) for folder in folders]
        facts += [f"round {round_}: {names[0]} are not {names[1]}"] if names[0] != names[1] else []
        for name in names[0]:
            left, right = (torch.load(folder / "tag" / name, weights_only=False) for folder in folders)
            facts += differences(left, right, f"round {round_}: {name}")
    (Path(out) / f"{rank}.json").write_text(json.dumps({"files": names[1], "differences": facts, "bytes": staged.size}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
