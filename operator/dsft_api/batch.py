"""How the global batch is cut over ranks: globalBatchSize = ranks x microBatchSize x gradient accumulation steps.
And how a micro-batch is padded, and cut for the chunked loss.

The global batch decides the loss curve and never changes by itself; what does not divide is refused with what would.
"""

from dataclasses import dataclass
from typing import Final

# Tensor cores want lengths in multiples of 8 (NVIDIA, Deep Learning Performance Guide). On CPU it would be work for nothing.
PAD_TO_MULTIPLE_OF: Final = {"cuda": 8, "cpu": 1}
_LISTED = 12


@dataclass(frozen=True)
class BatchPlan:
    """How many samples each rank sees at once, and how often, per optimizer step."""

    ranks: int
    micro_batch_size: int
    gradient_accumulation_steps: int

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.ranks * self.micro_batch_size * self.gradient_accumulation_steps


class BatchError(ValueError):
    """The global batch cannot be cut evenly.

    `rank_counts` are those that fit this micro-batch size, `micro_batch_sizes` those that fit this number of ranks,
    `global_batch_sizes` the nearest that fit both; each ascending, and possibly empty.
    """

    def __init__(self, global_batch_size: int, ranks: int, micro_batch_size: int, ranks_per_node: int) -> None:
        super().__init__(global_batch_size, ranks, micro_batch_size, ranks_per_node)
        self.global_batch_size = global_batch_size
        self.ranks = ranks
        self.micro_batch_size = micro_batch_size
        self.ranks_per_node = ranks_per_node
        self.rank_counts = _divisors_of_quotient(global_batch_size, micro_batch_size)
        self.micro_batch_sizes = _divisors_of_quotient(global_batch_size, ranks)
        at_once = ranks * micro_batch_size
        below = global_batch_size // at_once * at_once
        self.global_batch_sizes = tuple(size for size in (below, below + at_once) if size > 0)

    @property
    def message(self) -> str:
        """What does not fit."""
        return (
            f"globalBatchSize {self.global_batch_size} cannot be divided by "
            f"{self.ranks} ranks x microBatchSize {self.micro_batch_size}"
        )

    @property
    def remedy(self) -> str:
        """Every change of one number that makes it fit."""
        ways: list[str] = []
        if self.rank_counts:
            ways.append(f"rank counts that fit: {_listed(self.rank_counts, self.ranks)}{self._as_nodes()}")
        if self.micro_batch_sizes:
            ways.append(f"or set microBatchSize to {_listed(self.micro_batch_sizes, self.micro_batch_size, 'or')}")
        sizes = _listed(self.global_batch_sizes, self.global_batch_size, "or")
        ways.append(f"{'or ' if ways else ''}set globalBatchSize to {sizes}")
        return "; ".join(ways)

    def _as_nodes(self) -> str:
        each = self.ranks_per_node
        nodes = tuple(count // each for count in self.rank_counts if count % each == 0)
        if each == 1 or not nodes:
            return ""
        return f" (with {each} GPUs per node: {_listed(nodes, self.ranks // each)} nodes)"

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


def plan_batch(global_batch_size: int, ranks: int, micro_batch_size: int, ranks_per_node: int = 1) -> BatchPlan:
    """Cut a global batch over ranks; all numbers are 1 or more. `ranks_per_node` only serves the error's advice.

    Raises:
        BatchError: if `ranks * micro_batch_size` does not divide `global_batch_size`.
    """
    steps, rest = divmod(global_batch_size, ranks * micro_batch_size)
    if rest:
        raise BatchError(global_batch_size, ranks, micro_batch_size, ranks_per_node)
    return BatchPlan(ranks, micro_batch_size, steps)


def chunk_tokens(vocabulary: int) -> int:
    """Tokens of which `lossKernel: chunked` has the logits at one time: 256 MB in fp32.

    At least 128, since fewer keep no device busy.
    """
    return max(128, 2**26 // vocabulary)


def _divisors_of_quotient(total: int, factor: int) -> tuple[int, ...]:
    """All n with n * factor dividing total; none if factor alone does not divide it."""
    quotient, rest = divmod(total, factor)
    return () if rest else tuple(n for n in range(1, quotient + 1) if quotient % n == 0)


def _listed(numbers: tuple[int, ...], near: int, last: str = "") -> str:
    """Numbers in words; of many, those nearest to `near`."""
    kept = [str(number) for number in sorted(sorted(numbers, key=lambda number: abs(number - near))[:_LISTED])]
    return f"{', '.join(kept[:-1])} {last} {kept[-1]}" if last and len(kept) > 1 else ", ".join(kept)
