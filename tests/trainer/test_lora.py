"""Adapters: their losses are those of peft under plain torch, and what is exported loads there and is what was trained.

All jobs of two ranks share one start (`one_start`). With two ranks sums are taken in another order, so fp32 losses are compared
within 1e-5.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.spec.identity import ModelSpec
from dsft_trainer.checkpoint.best import weights_of
from dsft_trainer.checkpoint.listing import read_commits
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.indexed import IndexedDataset
from dsft_trainer.data.prepare import Prepared, open_prepared, tokenize_here
from dsft_trainer.data.sampler import GlobalBatches
from dsft_trainer.errors import TrainerError
from dsft_trainer.losses import nll
from dsft_trainer.model import load_tokenizer, pretrained
from tests.trainer import one_start, tiny
from tests.trainer.test_tasks import Spec, causal, classifying, values, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SECONDS = 1200
STEPS = 10
RELATIVE_TOLERANCE = 1e-5
LORA = {"rank": 4, "alpha": 8}


def adapted(spec: Spec, *, merge: bool = False, **lora: Any) -> Spec:
    """The same training of adapters, on rows of which a quarter is held out, and its export."""
    training = {**spec["training"], "lora": LORA | lora, "maxSteps": STEPS}
    training["optimizer"] = {**training["optimizer"], "weightDecay": 0.1}
    return {
        **spec,
        "training": training,
        "data": {**spec["data"], "evalFraction": 0.25},
        "evaluation": {"everySteps": STEPS},
        "export": {"mergeLora": merge},
    }


def chat(folder: Path, *, merge: bool = False, **lora: Any) -> Spec:
    return adapted(causal(folder, "text"), merge=merge, **lora)


def headless(folder: Path, *, merge: bool = False) -> Spec:
    """A classifier on a checkpoint that has neither head nor pooler, as those of masked language models."""
    spec = classifying(folder, globalBatchSize=12)
    base = folder / "bert-headless"
    if not base.exists():
        source = spec["model"]["uri"].removeprefix("file://")
        BertModel.from_pretrained(source, add_pooling_layer=False).save_pretrained(base)
        tiny.tokenizer(classifier=True).save_pretrained(base)
    execution = {"device": "cpu", "microBatchSize": 6}
    return adapted({**spec, "model": {**spec["model"], "uri": base.as_uri()}, "execution": execution}, merge=merge)


def recomputed(spec: Spec) -> Spec:
    return {**spec, "execution": {**spec["execution"], "activationCheckpointing": True}}


def chunked(spec: Spec) -> Spec:
    return {**spec, "execution": {**spec["execution"], "lossKernel": "chunked"}}


def in_bf16(spec: Spec) -> Spec:
    return {**spec, "training": {**spec["training"], "precision": "bf16"}}


def whole(spec: Spec) -> Spec:
    """Of all weights."""
    return {**spec, "training": {**spec["training"], "lora": None}, "export": {}}


TWO_RANKS: Mapping[str, Callable[[Path], Spec]] = {
    "lora": chat,
    "merged": lambda folder: chat(folder, merge=True),
    "named": lambda folder: chat(folder, targetModules="q_proj, v_proj"),
    "dora": lambda folder: chat(folder, useDora=True),
    "dora-merged": lambda folder: chat(folder, useDora=True, merge=True),
    "recomputed": lambda folder: recomputed(chat(folder, dropout=0.1)),
    "not-recomputed": lambda folder: chat(folder, dropout=0.1),
    "bf16-merged": lambda folder: in_bf16(chat(folder, merge=True)),
    "chunked": lambda folder: chunked(chat(folder)),
    "classifier": headless,
    "classifier-merged": lambda folder: headless(folder, merge=True),
    "whole": lambda folder: whole(chat(folder)),
}
# Each target that is refused, and what the message says of the layers that there are.
REFUSED = {
    "nothing": ("q_proj,query", "query is no linear layer", "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"),
    "no-linear-layer": ("embed_tokens", "embed_tokens is no linear layer", "q_proj"),
}


@dataclass(frozen=True)
class Trained:
    """The jobs of one start, after they ran."""

    folder: Path

    def job(self, name: str) -> Job:
        return Job.model_validate_json((self.folder / name / "job.json").read_text())

    def values(self, name: str, kind: str = "train") -> list[float]:
        return values(self.folder, name, kind)

    def export(self, name: str) -> Path:
        return self.folder / name / "run" / "export"

    def bytes_of_checkpoint(self, name: str, pattern: str = "*") -> int:
        (last,) = (self.folder / name / "run" / "checkpoints").glob(f"step-{STEPS:08d}-*")
        return sum(path.stat().st_size for path in last.glob(pattern))

    def data(self, name: str) -> Prepared:
        job = self.job(name)
        tokenizer = load_tokenizer(base_of(job))
        return open_prepared(tokenize_here(job, tokenizer, self.folder / name / "tokens"))


def base_of(job: Job) -> Path:
    return Path(job.spec.workload().model.uri.removeprefix("file://"))


def train(folder: Path, ranks: int) -> Trained:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *(one_start.__file__, str(folder)),
        ],
        env=os.environ | {"DSFT_SCRATCH": str(folder.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Trained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """On two ranks."""
    folder = tmp_path_factory.mktemp("lora")
    for name, spec in TWO_RANKS.items():
        write_job(folder / "jobs", name, spec(folder / "inputs"))
    for name, (targets, *_) in REFUSED.items():
        write_job(folder / "jobs", name, chat(folder / "inputs", targetModules=targets))
    return train(folder / "jobs", ranks=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """On one rank."""
    folder = tmp_path_factory.mktemp("lora-alone")
    write_job(folder / "jobs", "lora", chat(folder / "inputs"), ranks=1)
    return train(folder / "jobs", ranks=1)


def by_plain_peft(job: Job, data: IndexedDataset) -> list[float]:
    """The losses of the same training as peft's documentation shows it, in this process."""
    work = job.spec.workload()
    training, lora = work.training, work.training.lora
    assert lora is not None
    torch.manual_seed(training.seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_of(job), dtype=torch.float32),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules="all-linear" if lora.target_modules == "all-linear" else ["q_proj", "v_proj"],
            use_dora=lora.use_dora,
        ),
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = training.optimizer.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=training.optimizer.learning_rate,
    )
    batches = GlobalBatches(len(data), training.global_batch_size, training.seed)
    collator = Collator(0, work.model.task, work.data.max_length)
    losses = []
    for step in range(STEPS):
        batch = collator([data[int(row)] for row in batches.batch(step)])
        logits = model(**batch.inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("start", "name"), [("alone", "lora"), *(("trained", n) for n in ("lora", "named", "dora"))])
def test_the_losses_are_those_of_peft_under_plain_torch(start: str, name: str, request: pytest.FixtureRequest) -> None:
    runs: Trained = request.getfixturevalue(start)
    losses = runs.values(name)
    assert losses == pytest.approx(by_plain_peft(runs.job(name), runs.data(name).train), rel=RELATIVE_TOLERANCE)
    assert losses[-1] < losses[0] - 0.1


def test_recomputing_activations_does_not_change_the_losses(trained: Trained) -> None:
    assert trained.values("recomputed") == trained.values("not-recomputed") != trained.values("lora")


def test_the_chunked_loss_is_the_same(trained: Trained) -> None:
    assert trained.values("chunked") == pytest.approx(trained.values("lora"), rel=RELATIVE_TOLERANCE)


def test_a_new_head_is_trained_in_full_and_exported(trained: Trained) -> None:
    """Its biases begin at zero."""
    weights = load_file(trained.export("classifier") / "adapter_model.safetensors")
    biases = {name: float(tensor.abs().max()) for name, tensor in weights.items() if name.endswith("bias")}
    assert set(biases) == {"base_model.model.classifier.bias", "base_model.model.bert.pooler.dense.bias"}
    assert min(biases.values()) > 0


def loaded(trained: Trained, name: str, *, merged: bool) -> torch.nn.Module:
    """The export, by plain transformers or peft."""
    job, folder = trained.job(name), trained.export(name)
    classifies = job.spec.workload().model.task != "causal-lm"
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    if merged:
        assert not list(folder.glob("adapter*"))
        return auto.from_pretrained(folder)
    torch.manual_seed(1)  # Of what the base lacks; the adapter has it.
    base = auto.from_pretrained(base_of(job), **({"num_labels": 2} if classifies else {}))
    return PeftModel.from_pretrained(base, folder)


def held_out_loss(model: torch.nn.Module, job: Job, data: IndexedDataset) -> float:
    """As the engine's evaluation: the mean over what is trained on."""
    work = job.spec.workload()
    rows = [data[row] for row in range(len(data))]
    batch = Collator(0, work.model.task, work.data.max_length)(rows)
    model.eval()
    with torch.no_grad():
        return float(nll(work.model.task, model(**batch.inputs).logits, batch.labels)) / batch.weight


@pytest.mark.parametrize(
    ("name", "merged", "tolerance"),
    [
        ("lora", False, RELATIVE_TOLERANCE),
        ("merged", True, RELATIVE_TOLERANCE),
        ("dora", False, RELATIVE_TOLERANCE),
        ("dora-merged", True, RELATIVE_TOLERANCE),
        ("classifier", False, RELATIVE_TOLERANCE),
        ("classifier-merged", True, RELATIVE_TOLERANCE),
        # Merged weights are rounded to bf16 once more.
        ("bf16-merged", True, 5e-3),
    ],
)
def test_the_export_is_what_was_trained(trained: Trained, name: str, merged: bool, tolerance: float) -> None:
    """Its loss on the held-out rows is that of the engine at the end, which had learnt something."""
    held_out = trained.data(name).eval
    assert held_out is not None
    (evaluated,) = trained.values(name, "eval")
    model = loaded(trained, name, merged=merged)
    assert held_out_loss(model, trained.job(name), held_out) == pytest.approx(evaluated, rel=tolerance)


def test_the_merged_model_is_the_adapter_on_its_base(trained: Trained) -> None:
    tokens = torch.arange(5, 200).reshape(5, 39)
    models = [loaded(trained, name, merged=merged) for name, merged in (("lora", False), ("merged", True))]
    base = AutoModelForCausalLM.from_pretrained(base_of(trained.job("lora")))
    with torch.no_grad():
        adapter, merged, untrained = (model.eval()(input_ids=tokens).logits for model in (*models, base))
    torch.testing.assert_close(merged, adapter, rtol=1e-4, atol=1e-4)
    assert (adapter - untrained).abs().max() > 0.1


def test_an_adapter_says_what_it_belongs_to(trained: Trained) -> None:
    job, folder = trained.job("lora"), trained.export("lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_of(job))
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"AutoModelForCausalLM.from_pretrained('{base_of(job)}')" in card
    assert not list(folder.glob("model*.safetensors"))
    # The one line that peft's documentation has for it.
    assert AutoPeftModelForCausalLM.from_pretrained(folder)
    result = json.loads((folder.parent / "RESULT.json").read_text())
    assert result["output"]["format"] == "peft"
    merged = trained.export("merged")
    assert "library_name: transformers" in (merged / "README.md").read_text()
    assert json.loads((merged.parent / "RESULT.json").read_text())["output"]["format"] == "safetensors"


def test_a_checkpoint_has_the_size_of_the_adapters(trained: Trained) -> None:
    """12 bytes for each trained weight (fp32 master and two moments), and no frozen one."""
    adapter = sum(tensor.numel() for tensor in load_file(trained.export("lora") / "adapter_model.safetensors").values())
    states = trained.bytes_of_checkpoint("lora", "*_optim_states.pt")
    assert 12 * adapter < states < 12 * adapter + 100_000
    assert trained.bytes_of_checkpoint("lora", "*_model_states.pt") < 100_000
    assert trained.bytes_of_checkpoint("lora") < 0.4 * trained.bytes_of_checkpoint("whole")


def test_an_adapter_can_be_exported_from_its_checkpoint(trained: Trained, tmp_path: Path) -> None:
    """As of a run that stops early, whose best checkpoint is not its last."""
    store = open_store((trained.folder / "lora" / "run").as_uri())
    weights = weights_of(store, read_commits(store)[-1], tmp_path / "best", torch.float32)
    exported = load_file(trained.export("lora") / "adapter_model.safetensors")
    stored = {name.replace(".default.", "."): tensor for name, tensor in weights.items()}
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_are_not_there_are_refused_by_name(trained: Trained, name: str) -> None:
    _, message, there = REFUSED[name]
    failures = [json.loads(path.read_text()) for path in sorted((trained.folder / name).glob("failure-*.json"))]
    assert failures
    for failure in failures:
        assert failure["class"] == "ConfigInvalid"
        assert f"spec.training.lora.targetModules: {message}" in failure["message"]
        assert there in failure["remedy"]


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    spec = ModelSpec(uri=model.as_uri(), task="causal-lm")
    with pytest.raises(TrainerError, match=r"spec.model.uri: .* quantised") as caught:
        pretrained(spec, model, precision="bf16", attention="sdpa", pad_token_id=0)
    assert caught.value.failure_class is FailureClass.CONFIG_INVALID
