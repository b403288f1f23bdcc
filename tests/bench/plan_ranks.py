"""Ranks that train one job while every tensor is counted. Started by torchrun on a folder with job.json; see `tests.bench.plan`.

A tensor's memory counts from the operation that makes it until nothing refers to it, as torch's allocator on a GPU would count.
Each rank writes measured-<rank>.json: bytes by kind, and the most at one time in a step.
"""

import json
import resource
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsft_api.job import Job
from dsft_trainer.process import prepare_process
from dsft_trainer.progress import starting
from dsft_trainer.runtime.channel import Channel
from dsft_trainer.runtime.torchrun import TorchrunRuntime

# The names of the table.
PASSES, STEP = "most in forward and backward", "most in the optimizer step"
EVALUATION = "most in an evaluation"


class LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is storage:
            return

        def gone(reference: "weakref.ref[torch.UntypedStorage]") -> None:
            self.now -= size
            if self._known.get(key) is reference:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def nbytes(tensors: Any) -> int:
    """Of all tensors in a structure."""
    return sum(tensor.nbytes for tensor in tree_leaves(tensors) if isinstance(tensor, torch.Tensor))


def main(folder: Path) -> None:
    """Train the job, and write what was seen."""
    job = Job.model_validate_json((folder / "job.json").read_text())
    prepare_process(job)
    from dsft_trainer import engine, loop, rank

    dist.init_process_group("gloo")
    live = LiveBytes()
    most: dict[str, list[int]] = {PASSES: [], STEP: [], EVALUATION: []}
    kinds: dict[str, int] = {}

    def watched(kind: str, owner: Any, name: str) -> None:
        """Note the most at one time in a method, each time that it is called."""
        method = getattr(owner, name)

        def watching(*args: Any) -> Any:
            before, live.most = live.most, live.now
            result = method(*args)
            most[kind].append(live.most)
            live.most = before
            return result

        setattr(owner, name, watching)

    watched(EVALUATION, loop.Trainer, "_evaluate")
    watched(STEP, engine.Engine, "step")
    watched(PASSES, loop.Trainer, "_train_step")
    stage = engine.Engine.stage

    def staged(trained: engine.Engine, *args: Any) -> Any:
        zero = trained.deepspeed.optimizer
        moments = [state[name] for state in zero.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        kinds.update(
            {
                "weights of a rank": nbytes(zero.fp16_partitioned_groups_flat),
                "optimizer state of a rank": nbytes(zero.fp32_partitioned_groups_flat) + nbytes(moments),
                "gradients of a rank": nbytes(zero.grad_partitions_flat_buffer),
                "bucket of a rank": nbytes([bucket.buffer for bucket in zero.ipg_buckets.values()]),
                "parameters": sum(parameter.ds_numel for parameter in trained.model.parameters()),
            }
        )
        result = stage(trained, *args)
        kinds["staging of a rank"] = result.size
        return result

    engine.Engine.stage = staged
    with live:
        rank.run_rank(job, TorchrunRuntime(Channel(folder), starting(job)), torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The first step is not like the others: DeepSpeed does not know the order of the layers yet.
    measured = kinds | {kind: max(seen[1:] or seen) for kind, seen in most.items() if seen}
    measured["memory of the first process"] = peak
    (folder / f"measured-{dist.get_rank()}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
