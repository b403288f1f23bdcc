"""Every task, data format and precision trains: the loss is finite and falls, on two ranks with ZeRO-3.

All jobs share one start of the ranks (`one_start`); each is a row of JOBS, and is judged by its metrics in storage.
"""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft_api.job import Job, Ranks, RunRef
from dsft_api.resource import spec_hash
from dsft_api.spec import FineTuneSpec
from dsft_api.spec.identity import DataFormat
from tests.trainer import one_start, tiny

pytestmark = pytest.mark.slow

SECONDS = 280
STEPS = 16
NEW_TOKENS = 9
Spec = dict[str, Any]


def causal(folder: Path, data_format: DataFormat, *, chat_template: str | None = None, **training: Any) -> Spec:
    """The tiny Llama on the rows of a format."""
    model = folder / f"llama-{hash(chat_template)}"
    return {
        "model": {
            "uri": (model if model.exists() else tiny.llama(model, chat_template=chat_template)).as_uri(),
            "task": "causal-lm",
        },
        "data": {
            "train": {"uri": tiny.dataset(folder, data_format).as_uri(), "format": data_format},
            "maxLength": 64,
        },
        "training": _training(**training),
        "execution": {"device": "cpu", "microBatchSize": 4},
        "export": {"format": "none"},
    }


def classifying(
    folder: Path, data_format: DataFormat = "classification", *, num_labels: int = 2, **training: Any
) -> Spec:
    """The tiny BERT on so few rows that each step sees all of them."""
    model = folder / f"bert-{num_labels}"
    data = tiny.dataset(folder / f"labels-{num_labels}", data_format, 16, num_labels=num_labels)
    return {
        "model": {
            "uri": (model if model.exists() else tiny.bert(model, num_labels=num_labels)).as_uri(),
            "task": "sequence-classification",
            "numLabels": num_labels,
        },
        "data": {"train": {"uri": data.as_uri(), "format": data_format}},
        "training": _training(**{"globalBatchSize": 16} | training),
        "execution": {"device": "cpu", "microBatchSize": 8},
        "export": {"format": "none"},
    }


def _training(**changes: Any) -> Spec:
    return {
        "maxSteps": STEPS,
        "globalBatchSize": 8,
        "optimizer": {"learningRate": 3e-3},
        "schedule": {"type": "constant"},
        "precision": "fp32",
    } | changes


def recomputed(spec: Spec) -> Spec:
    return {**spec, "execution": {**spec["execution"], "activationCheckpointing": True}}


def packed(spec: Spec) -> Spec:
    return {**spec, "data": {**spec["data"], "packing": True}}


def grouped(spec: Spec) -> Spec:
    return {**spec, "data": {**spec["data"], "groupByLength": True}}


def streamed(spec: Spec, folder: Path) -> Spec:
    """From three files of sixteen rows; their epoch is as long as that of the one that they are evaluated on."""
    files = folder / "files"
    files.mkdir()
    lines = tiny.rows("text", 48)
    for number in range(3):
        tiny.write_jsonl(files / f"{number}.jsonl", lines[number * 16 : number * 16 + 16])
    train = {**spec["data"]["train"], "uri": files.as_uri()}
    return {
        **spec,
        "data": {**spec["data"], "train": train, "eval": spec["data"]["train"], "streaming": True},
        "evaluation": {"everySteps": 8},
    }


def chunked(spec: Spec) -> Spec:
    return {**spec, "execution": {**spec["execution"], "lossKernel": "chunked"}}


def mixed(spec: Spec, folder: Path) -> Spec:
    prompts = tiny.dataset(folder, "prompt_completion").as_uri()
    members = [{**spec["data"]["train"], "weight": 3}, {"uri": prompts, "format": "prompt_completion"}]
    return {**spec, "data": {"mixture": members, "maxLength": 64, "packing": True, "evalFraction": 0.1}}


def held_out(spec: Spec) -> Spec:
    return {**spec, "data": {**spec["data"], "evalFraction": 0.25}, "evaluation": {"everySteps": 8}}


def with_samples(spec: Spec, count: int = 3) -> Spec:
    samples = {"count": count, "maxNewTokens": NEW_TOKENS}
    return {**held_out(spec), "evaluation": {"everySteps": 8, "samples": samples}}


def exported(spec: Spec) -> Spec:
    return {**spec, "export": {"format": "safetensors"}}


def from_file(spec: Spec, path: Path) -> Spec:
    return {**spec, "data": {**spec["data"], "train": {**spec["data"]["train"], "uri": path.as_uri()}}}


def as_csv(folder: Path) -> Path:
    lines = tiny.rows("prompt_completion", 64)
    path = folder / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def as_parquet(folder: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(tiny.rows("prompt_completion", 64)), folder / "train.parquet")
    return folder / "train.parquet"


JOBS: Mapping[str, Callable[[Path], Spec]] = {
    "classification": classifying,
    "classification-of-three": lambda folder: classifying(folder, num_labels=3),
    "pair": lambda folder: classifying(folder, "pair"),
    "text": lambda folder: causal(folder, "text"),
    "text-bf16": lambda folder: causal(folder, "text", precision="bf16"),
    "text-recomputed": lambda folder: recomputed(causal(folder, "text")),
    "mixture": lambda folder: mixed(causal(folder, "text"), folder),
    "text-packed": lambda folder: held_out(packed(causal(folder, "text"))),
    "text-grouped": lambda folder: grouped(causal(folder, "text")),
    "text-streamed": lambda folder: streamed(causal(folder, "text"), folder),
    "text-chunked": lambda folder: held_out(chunked(causal(folder, "text"))),
    "text-held-out": lambda folder: held_out(causal(folder, "text")),
    "text-samples": lambda folder: with_samples(chunked(causal(folder, "text", lora={"rank": 4}))),
    "messages-held-out": lambda folder: held_out(causal(folder, "messages", chat_template=tiny.CHATML)),
    "messages-samples": lambda folder: exported(
        with_samples(causal(folder, "messages", chat_template=tiny.CHATML), count=16)
    ),
    "prompt-completion": lambda folder: causal(folder, "prompt_completion"),
    "prompt-completion-csv": lambda folder: from_file(causal(folder, "prompt_completion"), as_csv(folder)),
    "prompt-completion-parquet": lambda folder: from_file(causal(folder, "prompt_completion"), as_parquet(folder)),
    "messages": lambda folder: causal(folder, "messages", chat_template=tiny.CHATML),
    "messages-generation": lambda folder: causal(folder, "messages", chat_template=tiny.CHATML_GENERATION),
}


# A job whose rows are cut before what is to be learnt.
CUT = "cut-too-short"


def write_job(folder: Path, name: str, body: Spec, *, ranks: int = 2) -> None:
    spec = FineTuneSpec.model_validate(body)
    job = Job(
        run=RunRef(namespace="default", name=name, uid=name),
        attempt=1,
        spec=spec,
        spec_hash=spec_hash(spec),
        storage_prefix=(folder / name / "run").as_uri(),
        ranks=Ranks(count=ranks, device="cpu", threads=1),
    )
    (folder / name).mkdir(parents=True)
    (folder / name / "job.json").write_text(job.to_json())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all jobs, after they ran."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "inputs").mkdir()
    for name, spec in JOBS.items():
        write_job(folder / "jobs", name, spec(folder / "inputs"))
    cut = causal(folder / "inputs", "prompt_completion")
    write_job(folder / "jobs", CUT, {**cut, "data": {**cut["data"], "maxLength": 8}})
    ranks = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(one_start.__file__, str(folder / "jobs")),
        ],
        env=os.environ | {"DSFT_SCRATCH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ranks.returncode == 0, ranks.stdout + ranks.stderr
    return folder / "jobs"


def values(trained: Path, name: str, kind: str, metric: str = "loss") -> list[float]:
    """A job's metric at each step, or evaluation, in their order."""
    failures = [path.read_text() for path in sorted((trained / name).glob("failure-*.json"))]
    assert not failures, failures
    parts = sorted((trained / name / "run" / "metrics").glob("*.jsonl"))
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return [line[metric] for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("name", JOBS)
def test_the_loss_is_finite_and_falls(name: str, trained: Path) -> None:
    losses = values(trained, name, "train")
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize(("name", "classes"), [("classification", 2), ("classification-of-three", 3), ("text", 512)])
def test_an_untrained_model_guesses(name: str, classes: int, trained: Path) -> None:
    """So the loss is a mean over what is trained, in nats."""
    assert values(trained, name, "train")[0] == pytest.approx(math.log(classes), rel=0.1)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("text-recomputed", "text"),
        ("prompt-completion-csv", "prompt-completion"),
        ("prompt-completion-parquet", "prompt-completion"),
        ("messages-generation", "messages"),
        ("messages-samples", "messages-held-out"),
    ],
)
def test_what_must_not_change_the_losses_does_not(name: str, same_as: str, trained: Path) -> None:
    assert values(trained, name, "train") == values(trained, same_as, "train")


def test_groups_by_length_train_as_many_tokens_in_another_order(trained: Path) -> None:
    """Of whole epochs: each row of them is trained as often."""
    tokens, grouped_tokens = (values(trained, name, "train", "tokens") for name in ("text", "text-grouped"))
    assert sum(tokens) == sum(grouped_tokens)
    assert sorted(tokens) != sorted(grouped_tokens)


def test_what_is_streamed_is_evaluated_on_data_of_its_own(trained: Path) -> None:
    before, after = values(trained, "text-streamed", "eval")
    assert after < before
    # The run is over, so its tokens are gone.
    assert not list((trained / "text-streamed" / "run" / "tokens").rglob("*.arrow"))


def test_bf16_follows_fp32(trained: Path) -> None:
    assert values(trained, "text-bf16", "train") == pytest.approx(values(trained, "text", "train"), rel=0.05)


def test_rows_that_were_held_out_are_evaluated(trained: Path) -> None:
    losses = values(trained, "text-held-out", "eval")
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert values(trained, "text-held-out", "eval", "perplexity") == pytest.approx([math.exp(loss) for loss in losses])


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_chunked_loss_is_the_loss_but_for_rounding(kind: str, trained: Path) -> None:
    assert values(trained, "text-chunked", kind) == pytest.approx(values(trained, "text-held-out", kind), abs=1e-5)


def samples(trained: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """By step, in their order."""
    files = sorted((trained / name / "run" / "samples").glob("*.jsonl"))
    return {
        path.stem.rpartition("-")[2]: [json.loads(line) for line in path.read_text().splitlines()] for path in files
    }


@pytest.mark.parametrize("name", ["text-samples", "messages-samples"])
def test_each_evaluation_has_samples_and_says_where(name: str, trained: Path) -> None:
    at_steps = samples(trained, name)
    assert list(at_steps) == ["00000008", "00000016"]
    first, last = at_steps.values()
    for before, after in zip(first, last, strict=True):
        assert (before["row"], before["prompt"], before["expected"]) == (
            after["row"],
            after["prompt"],
            after["expected"],
        )
        assert before["prompt"]
        assert before["expected"]
    told = json.loads((trained / name / "run" / "RESULT.json").read_text())["evaluation"]["samples"]
    assert told.startswith("file://")
    assert Path(told.removeprefix("file://")).read_text().splitlines() == [
        json.dumps(line, ensure_ascii=False) for line in last
    ]


def test_samples_are_what_plain_transformers_writes(trained: Path) -> None:
    """The last ones, by the exported model, one prompt at a time and so without padding."""
    folder = trained / "messages-samples" / "run" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before, lines = samples(trained, "messages-samples").values()
    assert [line["completion"] for line in before] != [line["completion"] for line in lines]
    assert [line["row"] for line in lines] == list(range(16))
    for line in lines:
        prompt = tokenizer(line["prompt"], add_special_tokens=False, return_tensors="pt")
        written = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        text = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert line["completion"] == text


def test_rows_with_nothing_to_train_on_are_refused_on_every_rank(trained: Path) -> None:
    failures = [json.loads(path.read_text()) for path in sorted((trained / CUT).glob("failure-*.json"))]
    assert [failure["rank"] for failure in failures] == [0, 1]
    for failure in failures:
        assert failure["class"] == "DataInvalid"
        assert "of spec.data.train has nothing to train on in its first 8 tokens" in failure["message"]
        assert failure["remedy"] == "raise spec.data.maxLength from 8, or drop the row"
