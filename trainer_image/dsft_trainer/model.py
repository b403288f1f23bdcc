"""Loads a pretrained model straight into ZeRO-3 partitions, and its tokenizer.

transformers builds the model under `deepspeed.zero.Init` when it knows a ZeRO-3 configuration: rank 0 reads the weights,
each layer is scattered at once, and no rank ever holds the whole model.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dsft_api.conditions import FailureClass
from dsft_api.spec.identity import LoraSpec, ModelSpec
from dsft_trainer import chunked_loss
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


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token.

    Raises:
        TrainerError: ModelDenied if the folder has none.
    """
    if trust_remote_code:
        _check_code(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED,
            f"no tokenizer in {folder}: {str(error).splitlines()[0]}",
            _remedy(error, "let spec.model.uri name a folder with tokenizer.json beside config.json"),
        ) from error
    if tokenizer.pad_token is None:
        # A new token would need new embeddings; the end token is never attended to where it pads.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_code(folder: Path) -> None:
    """Refuse code of other repositories, of which nobody said that it may run: `auto_map: OTHER/REPO--module.Class`."""
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        named = json.loads(file.read_text()).get("auto_map", {}) if file.is_file() else {}
        elsewhere = re.findall(r"[^\"\s]+--", json.dumps(named))
        if elsewhere:
            raise TrainerError(
                FailureClass.MODEL_DENIED,
                f"auto_map of {name} takes code from another repository: {elsewhere[0].removesuffix('--')}",
                "keep the code beside config.json",
            )


def _remedy(error: Exception, otherwise: str | None = None) -> str | None:
    """Of a model that comes with code, transformers says which argument would run it."""
    if "trust_remote_code" in str(error):
        return "set spec.model.trustRemoteCode, if you trust the code (on a cluster the admin must allow the model)"
    return otherwise


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
    loss_kernel: Literal["standard", "chunked"] = "standard",
    pad_token_id: int | None,
    lora: LoraSpec | None = None,
) -> PreTrainedModel:
    """Build the model under zero.Init and load its weights; with `lora`, these are frozen below adapters. Collective.

    With `lora` it is a PeftModel, which has the attributes of the model in it.

    Raises:
        TrainerError: ModelDenied or ConfigInvalid if the folder does not hold such a model.
    """
    if attention == "flash_attention_2":
        _check_flash_attention()
    with _zero_init(config):
        model, missing = pretrained(spec, folder, precision=precision, attention=attention, pad_token_id=pad_token_id)
        model.config.use_cache = False
        if activation_checkpointing:
            model.activation_checkpointing_enable()
        if loss_kernel == "chunked":
            chunked_loss.install(model)
        if lora is None:
            return model
        # Only now: peft takes a second to import.
        from dsft_trainer.lora import add_adapters

        return cast("PreTrainedModel", add_adapters(model, lora, spec, missing))


def pretrained(
    spec: ModelSpec, folder: Path, *, precision: str, attention: str | None, pad_token_id: int | None
) -> tuple[PreTrainedModel, list[str]]:
    """The model in a folder, with the head of its task, and the names of the parameters that the folder lacks.

    No `attention` means whatever the model prefers, where it is not run.

    Raises:
        TrainerError: ModelDenied if there is no such model, ConfigInvalid if it is quantised.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _check_whole_precision(spec, folder)
    auto = AutoModelForCausalLM if spec.task == "causal-lm" else AutoModelForSequenceClassification
    head = {} if spec.task == "causal-lm" else {"num_labels": spec.num_labels or 2}
    try:
        model, loaded = auto.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            attn_implementation=attention,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            **head,
        )
    except (OSError, ValueError) as error:
        raise TrainerError(
            FailureClass.MODEL_DENIED,
            f"{spec.uri} cannot be loaded for {spec.task}: {str(error).splitlines()[0]}",
            _remedy(error),
        ) from error
    if pad_token_id is not None:
        # Decoder classifiers read the logits before the first padding: the pad token must be the one that pads here.
        model.config.pad_token_id = pad_token_id
    return model, sorted(loaded["missing_keys"])


def _check_flash_attention() -> None:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            "spec.execution.attention: flash_attention_2 needs a GPU and the package flash-attn, which is not here",
            "add flash-attn to an image of your own, or use sdpa",
        )


def _check_whole_precision(spec: ModelSpec, folder: Path) -> None:
    """Refuse quantised weights: they would be loaded past zero.Init, whole on every rank."""
    file = folder / "config.json"
    if file.is_file() and "quantization_config" in json.loads(file.read_text()):
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"spec.model.uri: the weights of {spec.uri} are quantised, which does not go with ZeRO-3",
            "name the model in bf16 that they were made of",
        )


@contextmanager
def _zero_init(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers builds models under zero.Init, and peft gathers the weights that it reads."""
    # transformers holds it by a weak reference.
    zero = _ZeroConfig(config)
    set_hf_deepspeed_config(zero)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
