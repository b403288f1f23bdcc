"""What a practitioner writes after Ray Train's guide "Get Started with DeepSpeed": BERT on MRPC, both of its ways to read data.

`python -m tests.bench.reference_script VARIANT SEED FOLDER`: `torch` (DeepSpeed makes the DataLoader) or `ray-data`. FOLDER has
model and rows. Settings and habits are the guide's: one seed on all ranks, an order of rows that is the same in each epoch, the
optimizer stepped past the engine, every rank evaluating everything. Other than there: files in place of the Hub, fp32 on CPU
ranks, no compiler. Writes FOLDER/metrics.json: accuracy and F1 of each epoch.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch

RANKS = 2
EPOCHS = 3
MICRO_BATCH, EVAL_BATCH = 16, 32
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    # torch's AdamW, since DeepSpeed's own would be compiled first. That one has no weight decay by default.
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.0, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    "fp16": {"enabled": False},
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "none"},
    },
}
Batches = Callable[[], Iterable[dict[str, Any]]]


def train(told: dict[str, Any]) -> None:
    """A rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    import deepspeed.ops

    # Or it compiles for half a minute.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    from transformers import set_seed

    set_seed(told["seed"])
    engine, optimizer, scheduler, train_batches, eval_batches = started(told)
    assert engine.zero_optimization_stage() == 3
    assert ray.train.get_context().get_world_size() == RANKS
    steps = 0
    for epoch in range(1, EPOCHS + 1):
        engine.train()
        for batch in train_batches():
            engine.backward(engine(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps += 1
        save(engine, {"epoch": epoch, "step": steps, **evaluated(engine, eval_batches)})


def started(told: dict[str, Any]) -> tuple[Any, Any, Any, Batches, Batches]:
    """DeepSpeed's engine, optimizer and scheduler, and batches of an epoch, of an evaluation."""
    import deepspeed
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(told["model"])
    model = AutoModelForSequenceClassification.from_pretrained(told["model"], num_labels=2, dtype=torch.float32)

    def collate(rows: Any) -> dict[str, Any]:
        # A DataLoader has a list of rows, Ray Data columns.
        columns = rows if isinstance(rows, dict) else {name: [row[name] for row in rows] for name in rows[0]}
        texts = list(columns["sentence1"]), list(columns["sentence2"])
        inputs = tokenizer(*texts, padding="longest", truncation=True, return_tensors="pt")
        return {**inputs, "labels": torch.as_tensor(columns["label"])}

    def initialize(**data: Any) -> tuple[Any, Any, Any, Any]:
        return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=DEEPSPEED, **data)

    if told["variant"] == "torch":
        engine, optimizer, loader, scheduler = initialize(training_data=told["train"], collate_fn=collate)
        held_out = torch.utils.data.DataLoader(
            told["validation"], batch_size=EVAL_BATCH, collate_fn=collate, drop_last=True
        )
        return engine, optimizer, scheduler, lambda: loader, lambda: held_out
    engine, optimizer, _, scheduler = initialize()

    def batches(split: str, size: int) -> Batches:
        shard: Any = ray.train.get_dataset_shard(split)
        return lambda: shard.iter_torch_batches(batch_size=size, collate_fn=collate)

    return engine, optimizer, scheduler, batches("train", MICRO_BATCH), batches("validation", EVAL_BATCH)


def evaluated(engine: Any, batches: Batches) -> dict[str, float]:
    """Over all ranks."""
    import torch
    from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

    metrics = {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()}
    engine.eval()
    for batch in batches():
        with torch.no_grad():
            logits = engine(**batch).logits
        for metric in metrics.values():
            metric.update(logits.argmax(dim=-1), batch["labels"])
    return {name: metric.compute().item() for name, metric in metrics.items()}


def save(engine: Any, metrics: dict[str, Any]) -> None:
    """Each rank brings its own shard; Ray Train puts them together."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        dist.barrier()
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
    if ray.train.get_context().get_world_rank() == 0:
        print(metrics, flush=True)


def main(variant: str, seed: str, folder: str) -> None:
    """Train, and write what was reported."""
    from datasets import Dataset

    place = Path(folder)
    # More CPUs than ranks, or Ray Data would wait for one for ever.
    ray.init(address="local", num_cpus=RANKS + 2, include_dashboard=False, object_store_memory=256 * 2**20)
    splits = {
        name: Dataset.from_list([json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()])
        for name in ("train", "validation")
    }
    told = {"variant": variant, "seed": int(seed), "model": str(place / "model")}
    on_ray = variant == "ray-data"
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=told if on_ray else told | splits,
        scaling_config=ray.train.ScalingConfig(num_workers=RANKS),
        run_config=ray.train.RunConfig(storage_path=str(place / "storage")),
        datasets={name: ray.data.from_huggingface(split) for name, split in splits.items()} if on_ray else None,
        dataset_config=ray.train.DataConfig(datasets_to_split=["train", "validation"]) if on_ray else None,
    )
    reported = [metrics for _, metrics in trainer.fit().best_checkpoints or []]
    (place / "metrics.json").write_text(json.dumps(sorted(reported, key=lambda metrics: metrics["epoch"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
