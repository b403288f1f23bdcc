"""Transformers' Trainer with a DeepSpeed configuration. Three lines are other ones than without dsft: they end in `# dsft`."""

import os
import tempfile

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dsft_trainer.integrations.transformers import ReportCallback, last_checkpoint  # dsft


def train_func(config):
    # First: while it lives, from_pretrained gives each rank its part of the weights only.
    arguments = TrainingArguments(
        output_dir=os.path.join(os.environ.get("DSFT_SCRATCH", tempfile.gettempdir()), "trained"),
        deepspeed=config["deepspeed"],
        remove_unused_columns=False,
        report_to="none",
        **config["arguments"],
    )
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(rows):
        texts = [row["text"] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=config["max_length"], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(config["model"]),
        args=arguments,
        train_dataset=load_dataset(**config["data"]),
        data_collator=collate,
        callbacks=[ReportCallback()],  # dsft
    )
    trainer.train(resume_from_checkpoint=last_checkpoint())  # dsft
