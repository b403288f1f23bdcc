"""What a practitioner writes without dsft: DeepSpeed under Ray Train, whose FailureConfig(max_failures) starts ranks again.

`python -m tests.bench.plain_ray FOLDER STEPS EVERY`. Ray Train's guide, with all its defaults: every rank saves into a temporary
folder and reports it. Rank 0 appends to FOLDER/events.jsonl when a start begins, and when a step is done.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch

RANKS = 2
MICRO_BATCH, ACCUMULATION, TOKENS = 2, 2, 32


def train(told: dict[str, Any]) -> None:
    """One start of a rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}  # or it compiles for half a minute
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(told["model"], dtype=torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3), config=told["deepspeed"]
    )
    first = restored(engine)
    tell(told, "begin", first)
    for step in range(first + 1, told["steps"] + 1):
        for _ in range(ACCUMULATION):
            tokens = torch.randint(10, 500, (MICRO_BATCH, TOKENS))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        tell(told, "step", step)
        if step % told["every"] == 0:
            report(engine, step)
            tell(told, "reported", step)


def restored(engine: Any) -> int:
    """The step to go on from."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder)
    return state["step"]


def report(engine: Any, step: int) -> None:
    """All ranks' files make one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        # Rank 0 makes the folder of the tag, and every rank has its own here.
        (Path(folder) / f"step{step}").mkdir()
        engine.save_checkpoint(folder, tag=f"step{step}", client_state={"step": step})
        (Path(folder) / "latest").write_text(f"step{step}")
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def tell(told: dict[str, Any], what: str, step: int) -> None:
    """A line, by rank 0."""
    if ray.train.get_context().get_world_rank() == 0:
        with (Path(told["folder"]) / "events.jsonl").open("a") as events:
            events.write(json.dumps({"what": what, "step": step}) + "\n")


def main(folder: str, steps: str, every: str) -> None:
    """Until it is killed, or trained to its end."""
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }
    ray.init(address="local", num_cpus=RANKS, include_dashboard=False, object_store_memory=256 * 2**20)
    told = {"folder": folder, "model": f"{folder}/model", "steps": int(steps), "every": int(every), "deepspeed": config}
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=told,
        scaling_config=ray.train.ScalingConfig(num_workers=RANKS),
        run_config=ray.train.RunConfig(
            storage_path=f"{folder}/storage",
            failure_config=ray.train.FailureConfig(max_failures=1000),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
