"""The trained model in Hugging Face layout: safetensors, tokenizer, config, model card, and a manifest written last.

What is exported loads with plain `from_pretrained`, without DeepSpeed or dsft.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.layout import EXPORT
from dsft_api.status import Output
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.engine import Engine
from dsft_trainer.errors import TrainerError
from dsft_trainer.versions import versions

MANIFEST = "manifest.json"
# Larger models are cut into files of this size; they download in parallel and restart cheaply.
MAX_SHARD = "5GB"


def export(
    job: Job,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    scratch: Path,
    *,
    step: int,
    metrics: Mapping[str, float],
    is_first: bool,
) -> Output | None:
    """Gather the weights and write them to `export/` in storage. Collective; the result is rank 0's, None elsewhere."""
    weights = engine.full_state_dict()
    if not is_first:
        return None
    folder = scratch / EXPORT
    # transformers' default, which generation wants; it was off for training only.
    model.config.use_cache = True
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(job, step, metrics))
    verify(folder)
    return _upload(job, store, folder)


def verify(folder: Path) -> None:
    """Check that the written files hold weights, none of them empty.

    ZeRO-3 leaves empty tensors behind where a gather was forgotten, and `from_pretrained` would fill them at random.

    Raises:
        TrainerError: Unknown, naming the tensors.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            shapes |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    empty = [name for name, shape in shapes.items() if math.prod(shape) == 0]
    if not shapes or empty:
        raise TrainerError(FailureClass.UNKNOWN, f"the export is not whole: {len(shapes)} tensors, empty: {empty[:5]}")


def _upload(job: Job, store: Store, folder: Path) -> Output:
    files = []
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"path": path.name, "size": path.stat().st_size, "sha256": digest})
        store.put_file(path, f"{EXPORT}/{path.name}")
    manifest = json.dumps({"specHash": job.spec_hash, "files": files}, indent=1).encode()
    store.put_bytes(f"{EXPORT}/{MANIFEST}", manifest)
    return Output(
        uri=f"{job.storage_prefix}/{EXPORT}",
        format=job.spec.export.format,
        bytes=sum(file["size"] for file in files),
        digest="sha256:" + hashlib.sha256(manifest).hexdigest(),
    )


def model_card(job: Job, step: int, metrics: Mapping[str, float]) -> str:
    """The README.md of the exported model, with the metadata that the Hub reads."""
    work = job.spec.workload()
    training, optimizer = work.training, work.training.optimizer
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()) or "| none | |"
    software = ", ".join(f"{name} {number}" for name, number in versions().items())
    base = work.model.uri.removeprefix("hf://")
    pipeline = "text-generation" if work.model.task == "causal-lm" else "text-classification"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
base_model: {base}
tags: [dsft, deepspeed, ray]
---
# {job.run.name}

{base} fine-tuned for {work.model.task} by dsft with DeepSpeed ZeRO-3.

| | |
|---|---|
| training data | {", ".join(source.uri for source in job.spec.train_sources())} |
| steps | {step} |
| global batch size | {training.global_batch_size} |
| optimizer | {optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g} |
| betas | {optimizer.betas[0]}, {optimizer.betas[1]} |
| schedule | {training.schedule.type}, {training.schedule.warmup_steps} warm-up steps |
| precision | {training.precision} |
| seed | {training.seed} |
| longest sequence | {work.data.max_length} tokens |
| spec | {job.spec_hash} |
| versions | {software} |

## Evaluation

| metric | value |
|---|---|
{rows}
"""
