"""Judges a run of the quickstart by its exported model, without any of the trainer's code.

`python -m dsft_demo.report baselines` says what there is to beat; `python -m dsft_demo.report result STATUS_YAML`
loads the export as any user of transformers would, and recomputes the metrics that the trainer reported.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsft_api.status import FineTuneStatus
from dsft_demo import DemoError
from dsft_demo.baselines import Baselines, cached, overlap
from dsft_demo.render import Pair, read_pairs

# What fine-tuning has to be worth: in all, and above each baseline.
LEAST_ACCURACY = 0.85
LEAST_OVER_OVERLAP = 0.25
LEAST_OVER_COSINE = 0.05

MAX_LENGTH = 128
_BATCH = 32

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Baselines and results of the quickstart.")
console = Console(highlight=False)

CacheFile = Annotated[Path | None, typer.Option(help="JSON file that keeps the baselines between calls.")]


@dataclass(frozen=True)
class Scores:
    """Binary classification metrics, 0 to 1; label 1 is the positive class of F1."""

    accuracy: float
    f1: float


@dataclass(frozen=True)
class Reported:
    """What the run's status says."""

    export: Path
    scores: Scores


def score(predicted: Sequence[int], labels: Sequence[int]) -> Scores:
    """Accuracy and F1 of predicted labels. F1 is 0 when nothing is positive."""
    outcomes = list(zip(predicted, labels, strict=True))
    positives = sum(predicted) + sum(labels)
    return Scores(
        accuracy=sum(guess == label for guess, label in outcomes) / len(outcomes),
        f1=2 * outcomes.count((1, 1)) / positives if positives else 0.0,
    )


def shortfalls(accuracy: float, baselines: Baselines) -> list[str]:
    """What the accuracy falls short of, one sentence each; empty when the run is good."""
    bars = {
        "the least that is expected": LEAST_ACCURACY,
        f"word overlap + {LEAST_OVER_OVERLAP}": baselines.overlap + LEAST_OVER_OVERLAP,
        f"zero-shot cosine + {LEAST_OVER_COSINE}": baselines.cosine + LEAST_OVER_COSINE,
    }
    return [f"accuracy {accuracy:.3f} is below {bar:.3f}: {name}" for name, bar in bars.items() if accuracy < bar]


def disagreements(recomputed: Scores, reported: Scores, count: int) -> list[str]:
    """Metrics in which the two differ by half a pair or more, so by more than rounding; one sentence each."""
    pairs = {name: (getattr(recomputed, name), getattr(reported, name)) for name in ("accuracy", "f1")}
    return [
        f"{name} recomputed from the export is {ours:.4f}, but the run's status says {theirs:.4f}"
        for name, (ours, theirs) in pairs.items()
        if abs(ours - theirs) >= 0.5 / count
    ]


def read_status(path: Path) -> Reported:
    """The export and the metrics of a finished run, from its status.yaml.

    Raises:
        DemoError: the file can't be read, or the run has no local export, no accuracy or no F1.
    """
    try:
        document = yaml.safe_load(path.read_text())
        status = FineTuneStatus.model_validate(document["status"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValidationError) as error:
        raise DemoError(f"{path} is no status of a run ({error}): pass the statusFile of `dsft status`") from error
    if status.output is None:
        raise DemoError(f"{path}: phase {status.phase} without status.output: finish the run with `dsft run` first")
    uri = urlsplit(status.output.uri)
    if uri.scheme != "file":
        raise DemoError(f"{path}: status.output.uri is {status.output.uri}: copy it here and name it as file://")
    metrics = status.evaluation.metrics if status.evaluation else {}
    if missing := {"accuracy", "f1"} - metrics.keys():
        raise DemoError(f"{path}: no {' and no '.join(sorted(missing))} in status.evaluation: run with data.eval")
    return Reported(Path(unquote(uri.path)), Scores(metrics["accuracy"], metrics["f1"]))


def classify(export: Path, pairs: Sequence[Pair]) -> list[float]:
    """The exported model's probability of label 1 for each pair, computed in float32 on the CPU.

    Raises:
        DemoError: transformers can't load the folder.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(export)
        model = AutoModelForSequenceClassification.from_pretrained(export, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise DemoError(f"{export} does not load as a sequence classification model: {error}") from error
    probabilities: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(pairs), _BATCH):
            batch = pairs[start : start + _BATCH]
            inputs = tokenizer(
                [pair.kjv for pair in batch],
                [pair.asv for pair in batch],
                padding=True,
                truncation=True,
                max_length=MAX_LENGTH,
                return_tensors="pt",
            )
            probabilities += model(**inputs).logits.softmax(dim=-1)[:, 1].tolist()
    return probabilities


def telling(pairs: Sequence[Pair]) -> list[int]:
    """Indices of three pairs to show: the first, the same verse in the fewest shared words, and the reverse."""
    same = [index for index, pair in enumerate(pairs) if pair.label == 1]
    different = [index for index, pair in enumerate(pairs) if pair.label == 0]
    return [
        0,
        min(same, key=lambda index: overlap(pairs[index])),
        max(different, key=lambda index: overlap(pairs[index])),
    ]


@app.command()
def baselines(cache: CacheFile = None) -> None:
    """Print what the held-out pairs yield without fine-tuning."""
    table = _table("Held-out pairs, before fine-tuning", cached(cache, read_pairs("train"), read_pairs("test")))
    console.print(table)


@app.command()
def result(
    status_yaml: Annotated[Path, typer.Argument(help="status.yaml of the finished run.")], cache: CacheFile = None
) -> None:
    """Check a finished run by its exported model; exit 1 when it is not what it should be."""
    reported = read_status(status_yaml)
    test = read_pairs("test")
    probabilities = classify(reported.export, test)
    recomputed = score([int(p >= 0.5) for p in probabilities], [pair.label for pair in test])
    bar = cached(cache or status_yaml.with_name("baselines.json"), read_pairs("train"), test)

    console.print(_examples(test, probabilities))
    console.print(_table("Held-out pairs, after fine-tuning", bar, recomputed))
    console.print(f"Exported model: {reported.export}", markup=False, soft_wrap=True)
    if problems := disagreements(recomputed, reported.scores, len(test)) + shortfalls(recomputed.accuracy, bar):
        raise DemoError("; ".join(problems))


def _examples(pairs: Sequence[Pair], probabilities: Sequence[float]) -> Table:
    table = Table(
        "King James Version", "American Standard Version", "Same verse", "Model", title="Three held-out pairs"
    )
    for index in telling(pairs):
        pair, probability = pairs[index], probabilities[index]
        verdict = "yes" if probability >= 0.5 else "no"
        sure = max(probability, 1 - probability)
        # Text, not str: the brackets around words that the translators added are no markup.
        table.add_row(Text(pair.kjv), Text(pair.asv), "yes" if pair.label else "no", f"{verdict} ({sure:.0%})")
    return table


def _table(title: str, bar: Baselines, tuned: Scores | None = None) -> Table:
    table = Table("", "Accuracy", "F1", title=f"{title} ({bar.count})")
    table.add_row("Majority label", f"{bar.majority:.3f}", "")
    table.add_row("Word overlap", f"{bar.overlap:.3f}", "")
    table.add_row("Pretrained model, zero-shot cosine", f"{bar.cosine:.3f}", "")
    if tuned is not None:
        table.add_row("Fine-tuned model", f"{tuned.accuracy:.3f}", f"{tuned.f1:.3f}", style="bold")
    return table


def main() -> None:
    """The command line; a DemoError is printed and ends it with exit code 1."""
    # transformers reads it when it is first imported, which is inside the commands.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except DemoError as error:
        Console(stderr=True, highlight=False).print("error:", str(error), markup=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
