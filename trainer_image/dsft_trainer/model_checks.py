"""What the manifest asks of the model and only the model can answer: it is asked, on every rank, before the first step.

A list of architectures would be out of date, and what a configuration says is not always what the code does.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from dsft_api.conditions import FailureClass
from dsft_api.spec import FineTuneSpec
from dsft_trainer.chunked_loss import capped, not_chunked, softcap
from dsft_trainer.engine import Engine
from dsft_trainer.errors import TrainerError
from dsft_trainer.losses import causal_nll

Forward = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

_ROW = 8
# Rounding of a deep model, in units of its precision: what two equal rows at other places may differ by.
_ROUNDING = 4.0


def check_model(spec: FineTuneSpec, engine: Engine, model: PreTrainedModel) -> None:
    """Refuse what this model cannot do of what the manifest wants. Switches dropout off. Collective.

    Raises:
        TrainerError: ConfigInvalid, naming the field and the type of the model.
    """
    if spec.evaluation.samples is not None and not model.can_generate():
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"spec.evaluation.samples: a model of type {model.config.model_type} cannot generate text",
            "remove spec.evaluation.samples, or train a model of another type",
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and spec.evaluation.samples is not None and spec.evaluation.samples.max_new_tokens >= positions:
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            f"spec.evaluation.samples.maxNewTokens {spec.evaluation.samples.max_new_tokens} leaves no room for a prompt in the"
            f" model's {positions} positions",
            f"set it to less than {positions}",
        )
    engine.eval()
    if spec.workload().data.packing:
        check_kept_apart(model, engine.forward)
    if spec.execution.loss_kernel == "chunked":
        check_chunked(model, engine.forward, engine.summed_loss)


def check_kept_apart(model: PreTrainedModel, forward: Forward) -> None:
    """Refuse a model in which packed rows see one another, or whose positions do not begin anew with each row.

    `forward` gives the model's logits, without dropout. Two rows change places: the logits of each must stay the same but for
    rounding, so a leak below the rounding of the model's precision is not seen. Collective.

    Raises:
        TrainerError: ConfigInvalid, naming the type of the model.
    """
    kind = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise _mixing(kind, "it carries a state from token to token, across rows")
    first, second = torch.arange(2 * _ROW).remainder(model.config.get_text_config().vocab_size).split(_ROW)
    inputs = {
        "input_ids": torch.stack([torch.cat([first, second]), torch.cat([second, first])]),
        "position_ids": torch.arange(_ROW).repeat(2, 2),
    }
    with torch.no_grad():
        logits = forward(inputs).float()
    moved = torch.cat([logits[1, _ROW:], logits[1, :_ROW]])
    change = float((logits[0] - moved).abs().max())
    if not change <= _ROUNDING * torch.finfo(model.dtype).eps * float(logits.abs().max()):
        raise _mixing(kind, f"the logits of a row change by {change:.2g} with its neighbour")


def check_chunked(
    model: PreTrainedModel,
    forward: Forward,
    summed_loss: Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor],
) -> None:
    """Refuse a model that makes more of its hidden states, or of its logits, than `chunked_loss` knows. Collective.

    Raises:
        TrainerError: ConfigInvalid, naming the type of the model.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise not_chunked(model, "its head is not one linear layer")
    ids = torch.arange(2 * _ROW).remainder(head.out_features)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    of_head: list[torch.Tensor] = []
    watched = head.register_forward_hook(lambda _head, _inputs, logits: of_head.append(logits))
    with torch.no_grad():
        logits = forward(inputs)
        watched.remove()
        loss = float(summed_loss(inputs, ids))
    rounding = _ROUNDING * torch.finfo(model.dtype).eps
    change = (capped(of_head[0], softcap(model)).float() - logits.float()).abs().max()
    if not float(change) <= rounding * float(logits.abs().max()):
        raise not_chunked(model, "it changes the logits of its head")
    expected = float(causal_nll(logits, ids.to(logits.device)))
    if not abs(loss - expected) <= rounding * abs(expected):
        raise not_chunked(model, f"the loss is {loss:.6g}, and {expected:.6g} by whole logits")


def _mixing(kind: str, how: str) -> TrainerError:
    return TrainerError(
        FailureClass.CONFIG_INVALID,
        f"spec.data.packing: a model of type {kind} does not keep packed rows apart: {how}",
        "set spec.data.packing to false, or train a model of another type",
    )
