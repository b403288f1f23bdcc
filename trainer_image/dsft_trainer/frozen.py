"""A digest of the weights below adapters, so that no adapter is put on another model than its own.

Checkpoints leave these weights out. Their bits are summed up as integers, parameter by parameter: in any order, and so on any
number of ranks, the sums are the same. That tells two models apart; against forgery it is no protection, and need not be.
"""

import hashlib
import json

import torch
import torch.distributed as dist
from torch import nn

_AS_INTEGER = {2: torch.int16, 4: torch.int32}
# Where peft keeps the weights that a module had before it was trained: a new head's, which nothing uses.
_UNUSED = ".original_module."


def frozen_digest(model: nn.Module, device: torch.device) -> str | None:
    """The digest of the frozen weights of a model in ZeRO-3 partitions; None if all are trained. Collective."""
    frozen = {
        name: p for name, p in model.named_parameters() if not p.requires_grad and _UNUSED not in name and p.ds_numel
    }
    if not frozen:
        return None
    sums = torch.stack([_sum_of_bits(p) for p in frozen.values()]).to(device)
    dist.all_reduce(sums)
    text = json.dumps(dict(zip(frozen, sums.tolist(), strict=True)), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _sum_of_bits(parameter: nn.Parameter) -> torch.Tensor:
    """The sum over this rank's share of a parameter, whose end may be padding."""
    share = parameter.ds_tensor.detach().flatten()
    size = min(max(parameter.ds_numel - dist.get_rank() * share.numel(), 0), share.numel())
    return share[:size].view(_AS_INTEGER[share.element_size()]).sum(dtype=torch.int64)
