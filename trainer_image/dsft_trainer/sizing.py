"""The numbers of a model and a data set that an estimate is made from, before anything is started.

The model is built on fake tensors: real classes, true shapes, no memory and no weights. So counts of parameters are exact, and
what autograd keeps of a row is what autograd itself says. Attention is that of torch's flash kernel for CPUs, which keeps what
the fused kernels of GPUs keep.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dsft_api.conditions import FailureClass
from dsft_api.estimate.sizes import DataSize, ModelSize
from dsft_api.job import Job
from dsft_api.spec.identity import LoraSpec, ModelSpec, WeightedDataset
from dsft_trainer.data.packing import best_fit
from dsft_trainer.data.prepare import encoders, load, parts_of
from dsft_trainer.data.sampler import Member, quotas
from dsft_trainer.data.sources import fetch
from dsft_trainer.data.tokens import Encoder, set_chat_template, tokenize
from dsft_trainer.errors import TrainerError
from dsft_trainer.lora import add_adapters
from dsft_trainer.model import DTYPES, load_tokenizer


def fetch_config(job: Job, cache: Path) -> Path:
    """A folder with the model's config and tokenizer. Weights of the Hub or S3 are left where they are.

    Raises:
        TrainerError: ModelDenied if there is none.
    """
    model = job.spec.workload().model
    folder = fetch(model.uri, storage=job.spec.storage, cache=cache, kind="tokenizer", revision=model.revision)
    if not (folder / "config.json").is_file():
        raise TrainerError(FailureClass.MODEL_DENIED, f"{model.uri} lacks config.json")
    return folder


def model_size(
    spec: ModelSpec, folder: Path, *, precision: str, attention: str, length: int, lora: LoraSpec | None = None
) -> ModelSize:
    """The model in `folder`, of which only config.json is read, and a row of `length` tokens in it.

    Raises:
        TrainerError: ModelDenied if transformers has no such model; what `add_adapters` raises.
    """
    causal = spec.task == "causal-lm"
    try:
        config = AutoConfig.from_pretrained(folder, **({} if causal else {"num_labels": spec.num_labels or 2}))
        auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        with FakeTensorMode():
            model = auto.from_config(config, dtype=DTYPES[precision], attn_implementation=attention)
            kept, logits = _forward(model, length)
            model.activation_checkpointing_enable()
            recomputed, _ = _forward(model, length)
        trained = model if lora is None else _adapted(model, lora, spec)
    except (OSError, ValueError, KeyError) as error:
        message = f"{spec.uri} cannot be built for {spec.task}: {str(error).splitlines()[0]}"
        raise TrainerError(FailureClass.MODEL_DENIED, message) from error
    tensors = list(trained.parameters())
    own = [sum(p.numel() for p in module.parameters(recurse=False)) for module in trained.modules()]
    return ModelSize(
        trainable=Counter(p.numel() for p in tensors if p.requires_grad),
        frozen=Counter(p.numel() for p in tensors if not p.requires_grad),
        layers=config.num_hidden_layers,
        largest_module=max(own),
        length=length,
        activation_row_bytes=kept,
        recomputed_row_bytes=recomputed,
        logits_per_row=logits,
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _adapted(model: PreTrainedModel, lora: LoraSpec, spec: ModelSpec) -> nn.Module:
    """The model with adapters, on no device: peft moves them about, which fake tensors do not bear.

    So activations are those of the model alone. They are about the same: a layer's input, which autograd keeps for its weights,
    it now keeps for its adapter.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
    return add_adapters(empty, lora, spec)


def _forward(model: PreTrainedModel, length: int) -> tuple[int, int]:
    """Bytes that autograd keeps of a row, weights left out, and the number of its logits."""
    model.config.use_cache = False
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    model.train()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    row: dict[str, Any] = {name: torch.ones((1, length), dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(**row).logits
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), logits.numel()


def data_size(job: Job, folder: Path, cache: Path, *, most_rows: int) -> DataSize:
    """The run's data, tokenised by the tokenizer in `folder`; of more than `most_rows` rows, some from all over the data.

    Raises:
        TrainerError: as the first seconds of a run would.
    """
    work = job.spec.workload()
    rows = load(job, cache / "source")
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, job, cache / "template")
    made = encoders(job, rows, tokenizer)
    train = parts_of("train", {name: (part.table, made[name]) for name, part in rows.items()})
    most = max(1, most_rows // len(train))
    counted = [_count(table, encoder, most, packing=work.data.packing) for table, encoder in train]
    members = [
        Member(made.samples, source.weight if isinstance(source, WeightedDataset) else 1.0)
        for made, (_, source) in zip(counted, work.data.sources(), strict=True)
    ]
    drawn = quotas(members) if work.data.mixture else [made.samples for made in counted]
    total = sum(made.samples for made in counted)
    exact = sum(len(made.lengths) for made in counted)
    return DataSize(
        rows=total,
        eval_rows=sum(part.table.num_rows for part in parts_of("eval", rows)),
        counted=exact,
        tokens=round(sum(float(made.lengths.mean()) * share for made, share in zip(counted, drawn, strict=True))),
        longest=max(int(made.lengths.max()) for made in counted) if exact == total else work.data.max_length,
        positions=max(made.positions for made in counted) if exact == total else work.data.max_length,
    )


@dataclass(frozen=True)
class _Counted:
    """Tokens of the samples that some rows make, rows or packed sequences; how many samples all rows make; the longest row."""

    lengths: NDArray[np.int64]
    samples: int
    positions: int


def _count(table: pa.Table, encoder: Encoder, most_rows: int, *, packing: bool) -> _Counted:
    rows = table.num_rows
    picked = np.linspace(0, rows - 1, min(most_rows, rows)).astype(np.int64)
    tokens = tokenize(table if len(picked) == rows else table.take(picked), encoder)
    lengths = np.array([len(row) for row in tokens["input_ids"]], dtype=np.int64)
    positions = int(lengths.max())
    if packing:
        lengths = np.array([lengths[together].sum() for together in best_fit(lengths, encoder.max_length)])
    return _Counted(lengths, round(len(lengths) * rows / len(picked)), positions)
