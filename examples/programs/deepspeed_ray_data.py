"""Bare DeepSpeed ZeRO-3 with Ray Data: variant A of Ray Train's guide "Get Started with DeepSpeed", made to resume.

What the guide gives to its TorchTrainer as `datasets` is the function `datasets` here. A checkpoint per epoch.
"""

import tempfile

import deepspeed
import ray.data
import ray.train
import torch
import torch.distributed as dist
from datasets import load_dataset
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed


def datasets(config):
    # Not from_huggingface, which loads a data set of files once more, by the name of its format, from the working folder.
    return {"train": ray.data.from_arrow(load_dataset(**config["data"]).with_format("arrow")[:])}


def train_func(config):
    set_seed(config["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config["deepspeed"])
    device = get_accelerator().device_name(engine.local_rank)

    def collate(rows):
        texts = list(rows["sentence1"]), list(rows["sentence2"])
        batch = tokenizer(*texts, padding="longest", truncation=True, return_tensors="pt")
        return {**batch, "labels": torch.as_tensor(rows["label"])}

    begin = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, state = engine.load_checkpoint(folder)
        begin = state["epoch"]

    shard = ray.train.get_dataset_shard("train")
    engine.train()
    for epoch in range(begin, config["epochs"]):
        for batch in shard.iter_torch_batches(
            batch_size=engine.train_micro_batch_size_per_gpu(), collate_fn=collate, drop_last=True
        ):
            loss = engine(**{name: value.to(device) for name, value in batch.items()}).loss
            engine.backward(loss)
            engine.step()
        save(engine, epoch + 1, {"loss": loss.item()})


def save(engine, epoch, metrics):
    """Each rank brings its own shard; Ray Train puts them together."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, client_state={"epoch": epoch})
        dist.barrier()
        ray.train.report(
            {"step": engine.global_steps, "epoch": epoch, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )
