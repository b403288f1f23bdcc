"""Bare DeepSpeed ZeRO-3 with a torch DataLoader: variant B of Ray Train's guide "Get Started with DeepSpeed", made to resume.

A checkpoint per epoch. Nothing in it is dsft's: it runs under any `TorchTrainer`.
"""

import tempfile

import deepspeed
import ray.train
import torch
import torch.distributed as dist
from datasets import load_dataset
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed


def train_func(config):
    set_seed(config["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=2)

    def collate(rows):
        texts = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
        batch = tokenizer(*texts, padding="longest", truncation=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=load_dataset(**config["data"]),
        collate_fn=collate,
        config=config["deepspeed"],
    )
    device = get_accelerator().device_name(engine.local_rank)

    begin = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder)
        begin = state["epoch"]

    engine.train()
    for epoch in range(begin, config["epochs"]):
        loader.data_sampler.set_epoch(epoch)
        for batch in loader:
            loss = engine(**{name: value.to(device) for name, value in batch.items()}).loss
            engine.backward(loss)
            engine.step()
        save(engine, epoch + 1, {"total_steps": config["epochs"] * len(loader), "loss": loss.item()})


def save(engine, epoch, metrics):
    """Each rank brings its own shard; Ray Train puts them together."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, client_state={"epoch": epoch})
        dist.barrier()
        ray.train.report(
            {"step": engine.global_steps, "epoch": epoch, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )
