"""Offline stand-ins for BERT and MRPC: `python -m tests.bench.reference_assets FOLDER`.

The data are the demo's verse pairs, under MRPC's column names. The model is the demo's BERT, cut to its first layers so that
three epochs take a minute on two cores. What the cut took away it learns again here, once, from pairs that no run sees: from
weights that know nothing, a learning rate of 2e-5 would teach nothing in three epochs. Its head is thrown away: each run makes
its own, by its seed, as with a BERT from the Hub. The same on each call, for the same number of threads.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from dsft_demo.baselines import pretrained
from dsft_demo.render import Pair, read_pairs
from tests.trainer import tiny

# Whole batches on two ranks, in training (32) and in evaluation (2 x 32): the reference drops rows that don't fill one.
TRAIN_ROWS, VALIDATION_ROWS = 1024, 448
LAYERS = 2
BATCH, EPOCHS, LEARNING_RATE = 32, 1, 2e-4


def rows(pairs: Iterable[Pair]) -> list[dict[str, str | int]]:
    """With MRPC's columns."""
    return [{"sentence1": pair.kjv, "sentence2": pair.asv, "label": pair.label} for pair in pairs]


def make(folder: Path) -> None:
    """`train.jsonl`, `validation.jsonl` and the model in `folder`."""
    known, held_out = read_pairs("train"), read_pairs("test")
    # Shuffled here, since the reference's Ray Data takes rows as they come.
    order = random.Random(0).sample(known, len(known))
    tiny.write_jsonl(folder / "train.jsonl", rows(order[:TRAIN_ROWS]))
    tiny.write_jsonl(folder / "validation.jsonl", rows(random.Random(1).sample(held_out, VALIDATION_ROWS)))
    make_model(order[TRAIN_ROWS:], folder / "model")


def make_model(pairs: Sequence[Pair], folder: Path) -> None:
    """The pretrained body and its tokenizer, in Hugging Face layout."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    model = AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=2, num_hidden_layers=LAYERS, dtype=torch.float32
    )
    steps = EPOCHS * (len(pairs) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    model.train()
    for step in range(steps):
        epoch, position = divmod(step, len(pairs) // BATCH)
        batch = random.Random(epoch).sample(pairs, len(pairs))[position * BATCH : (position + 1) * BATCH]
        texts = [pair.kjv for pair in batch], [pair.asv for pair in batch]
        inputs = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([pair.label for pair in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
