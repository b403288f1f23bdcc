"""Loads a pretrained model straight into ZeRO-3 partitions, and its tokenizer.

transformers builds the model under `deepspeed.zero.Init` when it knows a ZeRO-3 configuration: rank 0 reads the weights,
each layer is scattered at once, and no rank ever holds the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import ModelSpec
from dsft_trainer.errors import TrainerError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class _ZeroConfig:
    """The part of transformers' HfDeepSpeedConfig that `from_pretrained` reads; that class itself wants accelerate."""

    config: Mapping[str, Any]

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3

    def is_zero2(self) -> bool:
        return False

    def dtype(self) -> torch.dtype:
        enabled = [name for name in ("bf16", "fp16") if self.config.get(name, {}).get("enabled")]
        return DTYPES[enabled[0]] if enabled else torch.float32


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token.

    Raises:
        TrainerError: ModelDenied if the folder has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED,
            f"no tokenizer in {folder}: {str(error).splitlines()[0]}",
            "let spec.model.uri name a folder with tokenizer.json beside config.json",
        ) from error
    if tokenizer.pad_token is None:
        # A new token would need new embeddings; the end token is never attended to where it pads.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(model: PreTrainedModel, longest: int) -> None:
    """Refuse sequences that the model has no positions for; on a GPU they would look like a fault of the device.

    Raises:
        TrainerError: ConfigInvalid, naming both numbers.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"the longest row has {longest} tokens, and the model has {positions} positions",
            f"set spec.data.maxLength to {positions} or less",
        )


def load_model(
    spec: ModelSpec,
    folder: Path,
    config: Mapping[str, Any],
    *,
    precision: str,
    attention: str,
    activation_checkpointing: bool,
    pad_token_id: int | None,
) -> PreTrainedModel:
    """Build the model under zero.Init and load its weights. Collective.

    Raises:
        TrainerError: ModelDenied or ConfigInvalid if the folder does not hold such a model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM if spec.task == "causal-lm" else AutoModelForSequenceClassification
    head = {} if spec.task == "causal-lm" else {"num_labels": spec.num_labels or 2}
    zero = _ZeroConfig(config)
    set_hf_deepspeed_config(zero)
    try:
        model = auto.from_pretrained(folder, dtype=DTYPES[precision], attn_implementation=attention, **head)
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED, f"{spec.uri} cannot be loaded for {spec.task}: {str(error).splitlines()[0]}"
        ) from error
    finally:
        unset_hf_deepspeed_config()
    model.config.use_cache = False
    if pad_token_id is not None:
        # Decoder classifiers read the logits before the first padding: the pad token must be the one that pads here.
        model.config.pad_token_id = pad_token_id
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    return model
