"""The losses come from the optimisation, not from who runs it: Ray, torch elastic, bare DeepSpeed, any cut of the batch.

And it is DeepSpeed ZeRO-3 that trains: every parameter is partitioned over the ranks.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsft_api.batch import plan_batch
from dsft_api.job import Job, Ranks, RunRef
from dsft_api.manifest import parse
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.prepare import open_prepared, tokenize_here
from dsft_trainer.data.sampler import GlobalBatches, split
from dsft_trainer.engine import deepspeed_config
from dsft_trainer.model import load_tokenizer
from tests.trainer import tiny
from tests.trainer.runs import PATIENCE_SECONDS, Manifest, Run, causal_lm

STEPS = 10
RANKS = 2
ROOT = Path(__file__).parents[2]
RUN = RunRef(namespace="default", name="parity", uid="0")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Completions of one word to some forty: a mean of means over micro-batches would be far from the mean over tokens."""
    folder = tmp_path_factory.mktemp("assets")
    model = tiny.llama(folder / "model")
    rows = [
        {"prompt": f"What is weather number {n}? ", "completion": "rain and wind " * (1 if n % 3 else 2 + n % 13)}
        for n in range(64)
    ]
    train = tiny.write_jsonl(folder / "prompt_completion.jsonl", rows)
    document = causal_lm("parity", model, train, steps=STEPS)
    document["spec"]["data"]["lossOn"] = "completion"
    document["spec"]["execution"]["microBatchSize"] = 1
    document["spec"]["export"] = {"format": "none"}
    return document


@pytest.fixture(scope="module")
def losses(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of torch elastic: 2 ranks x 4 micro-batches of 1 row."""
    return trained(manifest, tmp_path_factory.mktemp("torchrun") / "run")


def trained(manifest: Manifest, folder: Path, *, runtime: str = "torchrun", workers: int = RANKS) -> list[float]:
    run = Run(manifest, folder)
    run.finish(runtime, workers)
    losses = run.losses()
    assert len(losses) == STEPS
    return losses


def changed(manifest: Manifest, group: str, **fields: object) -> Manifest:
    spec = manifest["spec"]
    return {**manifest, "spec": {**spec, group: {**spec.get(group, {}), **fields}}}


def job_of(manifest: Manifest) -> Job:
    spec = parse(json.dumps(manifest)).spec
    return Job(
        run=RUN,
        attempt=1,
        spec=spec,
        spec_hash="",
        storage_prefix="file:///nowhere",
        ranks=Ranks(count=RANKS, device="cpu", threads=1),
    )


def torchrun(script: str, *arguments: str) -> None:
    """Run a script of this folder on two ranks."""
    paths = [str(ROOT / "operator"), str(ROOT / "trainer_image"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *(str(Path(__file__).with_name(script)), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]


def dump_batches(job: Job, scratch: Path, out: Path) -> None:
    """The batches of every step and rank, for a loop that knows nothing of our data pipeline."""
    work = job.spec.workload()
    tokenizer = load_tokenizer(Path(work.model.uri.removeprefix("file://")))
    data = open_prepared(tokenize_here(job, tokenizer, scratch)).train
    batches = GlobalBatches(len(data), work.training.global_batch_size, work.training.seed)
    collator = Collator(tokenizer.pad_token_id, work.model.task, work.data.max_length)
    out.mkdir()
    for step in range(STEPS):
        indices = batches.batch(step)
        for rank in range(RANKS):
            micro = [
                collator([data[int(row)] for row in rows])
                for rows in split(indices, rank, RANKS, job.spec.execution.micro_batch_size)
            ]
            torch.save(
                {
                    "weight": int(data.weights[indices].sum()),
                    "micro": [{**batch.inputs, "labels": batch.labels} for batch in micro],
                },
                out / f"{step}-{rank}.pt",
            )


def test_a_bare_deepspeed_loop_has_the_same_losses(manifest: Manifest, losses: list[float], tmp_path: Path) -> None:
    job = job_of(manifest)
    dump_batches(job, tmp_path / "scratch", tmp_path / "batches")
    training = job.spec.workload().training
    config = deepspeed_config(job.spec, plan_batch(training.global_batch_size, RANKS, 1))
    optimizer = training.optimizer
    adamw = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
    }
    out = tmp_path / "losses.json"
    model = Path(job.spec.workload().model.uri.removeprefix("file://"))
    torchrun("bare_deepspeed.py", str(model), str(tmp_path / "batches"), str(out), json.dumps([config, adamw]))
    assert json.loads(out.read_text()) == losses


def test_ray_and_ray_data_have_the_same_losses(manifest: Manifest, losses: list[float], tmp_path: Path) -> None:
    assert trained(changed(manifest, "data", loader="ray-data"), tmp_path / "run", runtime="ray") == losses


def test_the_number_of_ranks_does_not_change_the_losses(
    manifest: Manifest, losses: list[float], tmp_path: Path
) -> None:
    one = changed(manifest, "execution", microBatchSize=2)
    # Sums in another order: equal up to rounding in fp32.
    assert trained(one, tmp_path / "run", workers=1) == pytest.approx(losses, abs=1e-5)


@pytest.fixture(scope="module")
def variants(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of further runs of two ranks, in one start of theirs."""
    folder = tmp_path_factory.mktemp("variants")
    seldom, often = evaluating(manifest, folder / "dropout")
    manifests = {"micro-batch": changed(manifest, "execution", microBatchSize=4), "seldom": seldom, "often": often}
    for name, document in manifests.items():
        storage = (folder / "jobs" / name / "run").as_uri()
        job = job_of(document).model_copy(
            update={"storage_prefix": storage, "run": RUN.model_copy(update={"uid": name})}
        )
        (folder / "jobs" / name).mkdir(parents=True)
        (folder / "jobs" / name / "job.json").write_text(job.to_json())
    torchrun("one_start.py", str(folder / "jobs"))
    return {name: stored_losses(folder / "jobs" / name / "run") for name in manifests}


def evaluating(manifest: Manifest, model: Path) -> tuple[Manifest, Manifest]:
    """With dropout, evaluated at the end alone and after every step."""
    shutil.copytree(manifest["spec"]["model"]["uri"].removeprefix("file://"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    dropout = changed(changed(manifest, "model", uri=model.as_uri()), "data", evalFraction=0.1)
    return changed(dropout, "evaluation", everySteps=STEPS), changed(dropout, "evaluation", everySteps=1)


def stored_losses(run: Path) -> list[float]:
    lines = [json.loads(line) for path in sorted((run / "metrics").iterdir()) for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_the_micro_batch_does_not_change_the_losses(variants: dict[str, list[float]], losses: list[float]) -> None:
    assert variants["micro-batch"] == pytest.approx(losses, abs=1e-5)


def test_evaluating_draws_from_no_random_generator(variants: dict[str, list[float]], losses: list[float]) -> None:
    """With dropout, one number drawn more or less would change all losses after it."""
    assert len(variants["often"]) == STEPS
    assert variants["often"] == variants["seldom"] != losses


def test_every_parameter_is_partitioned(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(job_of(manifest).to_json())
    torchrun("zero3_partitions.py", str(tmp_path / "job.json"), str(tmp_path))
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for facts in ranks:
        assert (facts["class"], facts["stage"]) == ("DeepSpeedEngine", 3)
    assert len(ranks[0]["parameters"]) == 21
    for shares in zip(*(facts["parameters"] for facts in ranks), strict=True):
        whole = shares[0]["whole"]
        assert all(share["has_ds_id"] for share in shares), shares
        # Outside a forward pass no rank holds a parameter's values.
        assert all(share["here"] == 0 for share in shares), shares
        # Equal shares, the last one padded.
        assert {share["share"] for share in shares} == {-(-whole // RANKS)}, shares


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_staged_checkpoint_is_what_deepspeed_writes(manifest: Manifest, tmp_path: Path, precision: str) -> None:
    """Copied at a step boundary and written after another step, every bit of it is from the boundary."""
    job = job_of(changed(manifest, "training", precision=precision))
    (tmp_path / "job.json").write_text(job.to_json())
    torchrun("staged_files.py", str(tmp_path / "job.json"), str(tmp_path))
    for rank in range(RANKS):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts["differences"] == []
        assert f"rng-{rank}.pt" in facts["files"]
        assert len([name for name in facts["files"] if name.endswith("_states.pt")]) == 2
        assert facts["bytes"] > 100_000
