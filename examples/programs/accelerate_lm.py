"""Accelerate with its DeepSpeed plugin. Three lines are other ones than without dsft: they end in `# dsft`."""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft_trainer.integrations.accelerate import load, save  # dsft


def train_func(config):
    set_seed(config["seed"])
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config["deepspeed"]),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(config["model"])

    def collate(rows):
        texts = [row["text"] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=config["max_length"], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    loader = DataLoader(
        load_dataset(**config["data"]),
        batch_size=config["batch_size"],
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    step = load(accelerator)  # dsft
    while step < config["steps"]:
        epoch, done = divmod(step, len(loader))
        rest = accelerator.skip_first_batches(loader, done) if done else loader
        rest.set_epoch(epoch)
        for batch in rest:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            metrics = {"loss": loss.item(), "epoch": step / len(loader), "total_steps": config["steps"]}
            if save(accelerator, step, config["save_steps"], metrics) or step == config["steps"]:  # dsft
                return
