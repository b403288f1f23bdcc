"""The numbers that an estimate is made from: of the model, of the data, and of where the run takes place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsft_api.spec import FineTuneSpec

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class ModelSize:
    """A model and one row of `length` tokens in it. `*_row_bytes` grow with the number of rows."""

    trainable: Mapping[int, int]
    """Trained tensors: how many there are of each number of elements."""
    frozen: Mapping[int, int]
    layers: int
    largest_module: int
    """Elements of the module with the most parameters of its own, which are gathered at once."""
    length: int
    activation_row_bytes: int
    """What autograd keeps of one row in the run's precision."""
    recomputed_row_bytes: int
    """The same with activation checkpointing."""
    logits_per_row: int
    max_positions: int | None = None

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return _elements(self.trainable) + _elements(self.frozen)

    @property
    def trained_parameters(self) -> int:
        """Elements of the tensors that are trained."""
        return _elements(self.trainable)

    def smaller_than(self, elements: int) -> int:
        """Elements in tensors of at most so many."""
        both = (*self.trainable.items(), *self.frozen.items())
        return sum(size * count for size, count in both if size <= elements)


def _elements(tensors: Mapping[int, int]) -> int:
    return sum(size * count for size, count in tensors.items())


def share(tensors: Mapping[int, int], ranks: int) -> int:
    """Elements of one rank's partitions: ZeRO-3 cuts each tensor by itself and pads it."""
    return sum(-(-size // ranks) * count for size, count in tensors.items())


@dataclass(frozen=True)
class DataSize:
    """The tokenised training data: an epoch of samples, which are rows or packed sequences.

    `counted` samples were made; the rest is taken to be like them.
    """

    rows: int
    eval_rows: int
    counted: int
    tokens: int
    """Tokens of all samples of an epoch, after cutting to maxLength."""
    longest: int
    """Tokens of the longest sample."""
    positions: int
    """Positions that the model needs: tokens of the longest row, of which a packed sequence has several."""

    @property
    def exact(self) -> bool:
        """Whether all rows were counted."""
        return self.counted == self.rows


@dataclass(frozen=True)
class Place:
    """Where the run is to take place. `None`: not known, so no verdict."""

    device: Literal["cuda", "cpu"]
    ranks: int
    nodes: int
    ranks_per_node: int
    """Of the fullest node."""
    gpu_bytes: int | None = None
    host_bytes: int | None = None
    """Memory of one node."""
    storage_bytes_per_second: float = 500e6
    """What one node uploads."""


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of DeepSpeed ZeRO-3 that decide about memory, in elements. Defaults are those of DeepSpeed 0.19."""

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    sub_group_size: int = 1_000_000_000
    grad_accum_dtype: str | None = field(default=None)

    @staticmethod
    def of(spec: FineTuneSpec) -> "ZeroSettings":
        """Those of `spec.deepspeed.config`."""
        zero = spec.deepspeed.config.get("zero_optimization", {})
        numbers = {name: int(zero[name]) for name in ZeroSettings.__dataclass_fields__ if name in zero}
        dtypes = spec.deepspeed.config.get("data_types", {})
        return ZeroSettings(**numbers, grad_accum_dtype=dtypes.get("grad_accum_dtype"))
