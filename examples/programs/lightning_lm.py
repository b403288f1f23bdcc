"""Lightning with its DeepSpeed strategy, on GPUs. Three lines are other ones than without dsft: they end in `# dsft`.

Lightning is not in the trainer image: add it to yours.
"""

import lightning
import torch
from datasets import load_dataset
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft_trainer.integrations.lightning import ReportCallback, last_checkpoint  # dsft


class LanguageModel(lightning.LightningModule):
    def __init__(self, name, learning_rate):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name).train()
        self.learning_rate = learning_rate

    def training_step(self, batch):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def train_func(config):
    lightning.seed_everything(config["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(rows):
        texts = [row["text"] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=config["max_length"], return_tensors="pt")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    loader = DataLoader(
        load_dataset(**config["data"]), batch_size=config["batch_size"], shuffle=True, collate_fn=collate
    )
    trainer = lightning.Trainer(
        strategy=DeepSpeedStrategy(config=config["deepspeed"]),
        logger=False,
        enable_checkpointing=False,
        callbacks=[ReportCallback()],  # dsft
        **config["trainer"],
    )
    module = LanguageModel(config["model"], config["learning_rate"])
    trainer.fit(module, loader, ckpt_path=last_checkpoint())  # dsft
