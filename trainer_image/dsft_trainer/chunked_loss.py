"""Cross entropy of a causal-lm over some hundred tokens at a time: the whole logits are never there.

The logits of 4096 tokens over 128 000 words are 2 GB in fp32, and backward needs them twice more. Here the head is applied to
one chunk of trained tokens, its logits are dropped, and backward computes them again. All chunks are inside one call of the
head's module, since DeepSpeed gathers and releases a module's weights around its calls, forward and backward.
"""

from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dsft_api.batch import chunk_tokens
from dsft_api.conditions import FailureClass
from dsft_trainer.data.tokens import IGNORED
from dsft_trainer.errors import TrainerError


def install(model: PreTrainedModel) -> None:
    """Let `model(..., labels=...)` give the summed loss of `causal_nll` as `loss`, without `logits`.

    Without labels the model does what it did. Before `deepspeed.initialize`; the parameters and their names stay the same.

    Raises:
        TrainerError: ConfigInvalid, naming the type of the model, if it is not a body with a linear head.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or body is model:
        raise not_chunked(model, "its head is not one linear layer")
    cap = softcap(model)
    logits_of, model_forward = head.forward, model.forward

    def head_forward(hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return logits_of(hidden) if labels is None else _summed_nll(head, hidden, labels, cap)

    @wraps(model_forward)
    def forward(*args: Any, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return model_forward(*args, **inputs)
        hidden = body(*args, **inputs).last_hidden_state
        return CausalLMOutput(loss=head(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    head.forward, model.forward = head_forward, forward


def softcap(model: PreTrainedModel) -> float | None:
    """The bound that Gemma 2 and 3n put on their logits; None for other models."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Logits within the bound."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def not_chunked(model: PreTrainedModel, why: str) -> TrainerError:
    """The refusal of a model whose loss cannot be computed so."""
    return TrainerError(
        FailureClass.CONFIG_INVALID,
        f"spec.execution.lossKernel chunked does not fit a model of type {model.config.model_type}: {why}",
        "set spec.execution.lossKernel to standard",
    )


def _summed_nll(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, cap: float | None) -> torch.Tensor:
    """hidden: [tokens, width]; labels: [tokens], already shifted."""
    trained = (labels != IGNORED).nonzero().squeeze(1)
    total = torch.zeros((), device=hidden.device)
    # Of no trained token there is one empty chunk: each rank has a gradient of the head to reduce.
    for tokens in trained.split(chunk_tokens(head.out_features)):
        nll = checkpoint(
            _chunk_nll, hidden[tokens], labels[tokens], head, cap, use_reentrant=False, preserve_rng_state=False
        )
        total = total + nll
    return total


def _chunk_nll(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Linear, cap: float | None) -> torch.Tensor:
    logits = functional.linear(hidden, head.weight, head.bias)
    return functional.cross_entropy(capped(logits, cap).float(), labels, reduction="sum")
