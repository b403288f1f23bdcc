"""The trained model in Hugging Face layout: safetensors, tokenizer, config, model card, and a manifest written last.

What is exported loads with plain `from_pretrained` of transformers, or of peft for an adapter, without DeepSpeed or dsft.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.layout import EXPORT
from dsft_api.spec.identity import LoraSpec
from dsft_api.status import Output
from dsft_trainer.checkpoint.best import weights_of
from dsft_trainer.checkpoint.commits import Commit
from dsft_trainer.checkpoint.store import Store
from dsft_trainer.errors import TrainerError
from dsft_trainer.hub import push
from dsft_trainer.model import DTYPES, pretrained
from dsft_trainer.versions import versions

MANIFEST = "manifest.json"
# Larger models are cut into files of this size; they download in parallel and restart cheaply.
MAX_SHARD = "5GB"


def export(
    job: Job,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    scratch: Path,
    commit: Commit,
    weights: Mapping[str, torch.Tensor] | None,
) -> Output:
    """Write the weights of a commit to `export/` in storage, on one rank. None: they are read from storage, too."""
    if weights is None:
        dtype = DTYPES[job.spec.workload().training.precision]
        weights = weights_of(store, commit, scratch / "best", dtype)
    folder = scratch / EXPORT
    _save(job, model, weights, folder, pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(job, commit.step, commit.metrics))
    verify(folder)
    repository, kept = job.spec.export.push_to_hub, scratch / "hub"
    if repository is not None:
        # The store may move the files away.
        shutil.copytree(folder, kept, copy_function=os.link)
    output = _upload(job, store, folder)
    if repository is not None:
        pushed = push(repository, kept, f"{job.run.name}: step {commit.step}")
        output = output.model_copy(update={"hub": pushed})
    return output


def _save(job: Job, model: Any, weights: Mapping[str, torch.Tensor], folder: Path, *, pad_token_id: int | None) -> None:
    """The whole model, or the adapter alone. A merged model is made of the adapter and of the weights it was trained on."""
    work = job.spec.workload()
    if work.training.lora is None:
        # transformers' default, which generation wants; it was off for training only.
        model.config.use_cache = True
        model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD)
        return
    from dsft_trainer.lora import save_adapter, save_merged

    base = Path(model.name_or_path)
    adapter = folder.with_name("adapter") if job.spec.export.merge_lora else folder
    save_adapter(model, weights, work.model, adapter)
    if job.spec.export.merge_lora:
        verify(adapter)
        whole, _ = pretrained(
            work.model,
            base,
            precision=work.training.precision,
            attention=None,
            pad_token_id=pad_token_id,
        )
        save_merged(whole, adapter, folder, MAX_SHARD)


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
    # Of an attempt before: the adapter beside its merged model would be put on it a second time by who loads it.
    ours = {f"{EXPORT}/{name}" for name in (MANIFEST, *(file["path"] for file in files))}
    store.delete([entry.key for entry in store.list(f"{EXPORT}/") if entry.key not in ours])
    manifest = json.dumps({"specHash": job.spec_hash, "files": files}, indent=1).encode()
    store.put_bytes(f"{EXPORT}/{MANIFEST}", manifest)
    return Output(
        uri=f"{job.storage_prefix}/{EXPORT}",
        format="peft" if _is_adapter(job) else job.spec.export.format,
        bytes=sum(file["size"] for file in files),
        digest="sha256:" + hashlib.sha256(manifest).hexdigest(),
    )


def _is_adapter(job: Job) -> bool:
    """Whether the export is an adapter, which needs the model that it was trained on."""
    return job.spec.workload().training.lora is not None and not job.spec.export.merge_lora


def model_card(job: Job, step: int, metrics: Mapping[str, float]) -> str:
    """The README.md of the exported model, with the metadata that the Hub reads."""
    work = job.spec.workload()
    training, optimizer = work.training, work.training.optimizer
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items()) or "| none | |"
    software = ", ".join(f"{name} {number}" for name, number in versions().items())
    base = work.model.uri.removeprefix("hf://")
    # The Hub refuses a card whose base model is none of its own.
    base_model = f"base_model: {base}\n" if work.model.uri.startswith("hf://") else ""
    pipeline = "text-generation" if work.model.task == "causal-lm" else "text-classification"
    lora = training.lora
    how = f" with {lora.name} of rank {lora.rank}" if lora else ""
    return f"""---
library_name: {"peft" if _is_adapter(job) else "transformers"}
pipeline_tag: {pipeline}
{base_model}tags: [{"lora, " if lora else ""}dsft, deepspeed, ray]
---
# {job.run.name}

{base} fine-tuned for {work.model.task}{how} by dsft with DeepSpeed ZeRO-3.
{_loading(job) if _is_adapter(job) else ""}

| | |
|---|---|
| training data | {", ".join(source.uri for source in job.spec.train_sources())} |
| steps | {step} |
| global batch size | {training.global_batch_size} |
| optimizer | {optimizer.name}, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g} |
| betas | {optimizer.betas[0]}, {optimizer.betas[1]} |
| schedule | {training.schedule.type}, {training.schedule.warmup_steps} warm-up steps |
| precision | {training.precision} |
| trained | {_trained(lora)} |
| seed | {training.seed} |
| longest sequence | {work.data.max_length} tokens |
| spec | {job.spec_hash} |
| versions | {software} |

## Evaluation

| metric | value |
|---|---|
{rows}
"""


def _trained(lora: LoraSpec | None) -> str:
    if lora is None:
        return "all weights"
    return f"adapters ({lora.target_modules}), alpha {lora.alpha}, dropout {lora.dropout:g}"


def _loading(job: Job) -> str:
    """How to load an adapter, which is nothing without its base."""
    model = job.spec.workload().model
    auto = "AutoModelForCausalLM" if model.task == "causal-lm" else "AutoModelForSequenceClassification"
    options = {"revision": model.revision, "num_labels": model.num_labels}
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value is not None)
    base = model.uri.removeprefix("hf://").removeprefix("file://")
    return f"""
This is an adapter: it needs the model that it was trained on.

```python
base = {auto}.from_pretrained({base!r}{given})
model = PeftModel.from_pretrained(base, FOLDER)
```
"""
