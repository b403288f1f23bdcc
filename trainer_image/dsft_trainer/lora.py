"""Low-rank adapters by peft (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353) on a model in ZeRO-3 partitions.

The pretrained weights are frozen where they lie. An adapter is small: every rank makes it whole, and DeepSpeed divides rank 0's
when it starts. What belongs to it in full: the head of a classifier, and whatever the checkpoint of the model lacks, since
nobody could load that again.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ALL_LINEAR, LoraSpec, ModelSpec
from dsft_trainer.errors import TrainerError

log = logging.getLogger(__name__)

_TASK_TYPES = {"causal-lm": TaskType.CAUSAL_LM, "sequence-classification": TaskType.SEQ_CLS}
_FIELD = "spec.training.lora.targetModules"


def add_adapters(model: PreTrainedModel, lora: LoraSpec, spec: ModelSpec, missing: Iterable[str] = ()) -> PeftModel:
    """Freeze the model and lay adapters over its target modules. Collective for DoRA, which reads the weights.

    `missing` names the parameters that the model's checkpoint lacks.

    Raises:
        TrainerError: ConfigInvalid if a target is no linear layer of the model, naming those that are.
    """
    whole = _trained_whole(model, spec, missing)
    targets = _targets(model, lora, whole)
    adapted = get_peft_model(
        model,
        LoraConfig(
            task_type=_TASK_TYPES[spec.task],
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            use_dora=lora.use_dora,
            modules_to_save=whole or None,
        ),
        # The dtype of the model, as for its own weights: DeepSpeed keeps the fp32 masters.
        autocast_adapter_dtype=False,
    )
    trained = sum(_size(p) for p in adapted.parameters() if p.requires_grad)
    log.info("training adapters: %d weights of %d", trained, sum(map(_size, adapted.parameters())))
    return adapted


def save_adapter(model: PeftModel, trained: Mapping[str, torch.Tensor], spec: ModelSpec, folder: Path) -> None:
    """Write the adapter as peft has it: adapter_model.safetensors and adapter_config.json.

    `trained` are the gathered weights by their names in the model. The configuration names the base as transformers would look
    for it, not this node's copy.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = spec.uri.removeprefix("hf://").removeprefix("file://")
    config.revision = spec.revision
    # No embeddings beside the adapter: peft would ask the Hub how many the model had.
    model.save_pretrained(folder, state_dict=trained, save_embedding_layers=False)


def save_merged(base: PreTrainedModel, adapter: Path, folder: Path, max_shard_size: str) -> None:
    """Write the model that the adapter in a folder makes of its base, in transformers' layout."""
    merged = PeftModel.from_pretrained(base, adapter, torch_device="cpu").merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder, max_shard_size=max_shard_size)


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _trained_whole(model: PreTrainedModel, spec: ModelSpec, missing: Iterable[str]) -> list[str]:
    """Modules that are trained in full: all above the base of a classifier, and the owners of missing parameters."""
    whole = {name.rpartition(".")[0] for name in missing}
    if spec.task == "sequence-classification":
        head = (name for name, child in model.named_children() if child is not model.base_model)
        whole |= {name for name in head if list(model.get_submodule(name).parameters())}
    return sorted(name for name in whole if not any(name.startswith(f"{above}.") for above in whole))


def _targets(model: PreTrainedModel, lora: LoraSpec, whole: list[str]) -> str | list[str]:
    """The target modules as peft takes them, each of which is there."""
    if lora.target_modules == ALL_LINEAR:
        return ALL_LINEAR
    linear = _linear_layers(model, whole)
    wanted = [name.strip() for name in lora.target_modules.split(",")]
    for name in wanted:
        if not any(f".{there}".endswith(f".{name}") for there in linear):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise TrainerError(
                FailureClass.CONFIG_INVALID,
                f"{_FIELD}: {name} is no linear layer of the model that can have an adapter",
                f"name some of {there}; or write {ALL_LINEAR}",
            )
    return wanted


def _linear_layers(model: PreTrainedModel, whole: list[str]) -> list[str]:
    """Full names of the layers that can have an adapter.

    Not those that are trained in full, and no output layer that shares its weights with the embeddings: merged, the update would
    change these too.
    """
    output = model.get_output_embeddings()
    tied = output if getattr(model.config, "tie_word_embeddings", False) else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not tied
        and not any(name == above or name.startswith(f"{above}.") for above in whole)
    ]
