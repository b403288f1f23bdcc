"""The ranks of `tests.bench.checkpoint`, started by torchrun: STORAGE SCRATCH OUT ROUNDS."""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from pyarrow.fs import FileSystem, S3FileSystem
from transformers import LlamaConfig, LlamaForCausalLM

from dsft_api.spec.identity import OptimizerSpec, ScheduleSpec
from dsft_trainer import collectives
from dsft_trainer.checkpoint.checkpointer import Checkpointer, Identity, Point
from dsft_trainer.checkpoint.commits import Commit
from dsft_trainer.checkpoint.listing import Retention
from dsft_trainer.checkpoint.staging import StagedFiles
from dsft_trainer.checkpoint.store import open_store
from dsft_trainer.engine import Engine, start_engine, without_compiled_ops
from dsft_trainer.runtime import Place
from tests.bench.checkpoint import RANKS, STEPS_AFTER, STEPS_BEFORE

# 94 million weights of 12 bytes (fp32, and Adam's two moments), over two ranks 563 MB each.
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=16,
    pad_token_id=None,
    tie_word_embeddings=False,
)


def timed(action: Callable[[], object]) -> float:
    """Seconds, from when all ranks are there until this one is done."""
    collectives.barrier()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def slowest(seconds: float) -> float:
    """The worst of all ranks."""
    return max(collectives.gather(seconds))


def started() -> Engine:
    """A model of random weights under ZeRO-3, as the trainer makes its engine."""
    without_compiled_ops()
    deepspeed.init_distributed("gloo")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
    }
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(CONFIG)
    return start_engine(model, config, OptimizerSpec(learning_rate=1e-4), ScheduleSpec(), 1000, torch.device("cpu"))


class Bench:
    """One rank."""

    def __init__(self, uri: str, scratch: Path) -> None:
        self.engine = started()
        self.uri = uri
        self.scratch = scratch
        place = Place(rank=dist.get_rank(), world_size=RANKS, local_rank=dist.get_rank())
        identity = Identity(spec_hash="", zero_stage=3, precision="fp32", versions={})
        store = open_store(f"{uri}/ours")
        self.checkpointer = Checkpointer(store, place, scratch / "ours", identity, Retention(1, 0, "loss", False))
        self.checkpointer.begin(1)
        self.saved = 0
        self.staged: StagedFiles | None = None

    def _cpu(self) -> float:
        """CPU seconds of all ranks so far, their threads included."""
        return sum(collectives.gather(time.process_time()))

    def step(self) -> float:
        """One optimizer step on a few tokens: communication and the optimizer, as in any small batch."""
        tokens = torch.randint(5, 8000, (1, 64))

        def train() -> None:
            logits = self.engine.forward({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
            self.engine.backward(logits.float().logsumexp(-1).mean())
            self.engine.step()

        return slowest(timed(train))

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def memcpy(self) -> float:
        """A plain copy of the same tensors into memory that was touched before."""
        if self.staged is None:
            self.staged = self.engine.stage(self.scratch / f"floor-{dist.get_rank()}", "floor")
            self.copies = [torch.empty_like(t).fill_(0) for s in self.staged.files.values() for t in s.tensors]
        sources = [t for s in self.staged.files.values() for t in s.tensors]

        def copy() -> None:
            for target, source in zip(self.copies, sources, strict=True):
                target.copy_(source)

        return slowest(timed(copy))

    def ours(self, sample: dict[str, float], usual: float, cpu: float) -> None:
        """Stage, go on, and see when it is committed."""
        self.saved += 1
        point = Point(self.saved, samples=self.saved, epoch=0.0, metrics={})
        begin, spent = time.perf_counter(), self._cpu()
        sample["ours_blocked"] = slowest(timed(lambda: self.checkpointer.start(self.engine, point)))
        after = self.steps(STEPS_AFTER)
        while sum(collectives.gather(self.checkpointer.saving)):
            after.append(self.step())
        outcome = self.checkpointer.settle()
        assert isinstance(outcome, Commit), outcome
        sample["ours_committed_after"] = time.perf_counter() - begin
        sample["ours_excess"] = sum(after) - usual * len(after)
        sample["ours_cpu"] = self._cpu() - spent - cpu * len(after)
        sample["ours_steps_meanwhile"] = len(after)

    def synchronous(self, sample: dict[str, float], usual: float, cpu: float) -> None:
        """The reference example: every rank saves into a temporary folder, all wait, and report() uploads it."""
        spent = self._cpu()
        sample["sync_blocked"] = slowest(timed(self._save_and_report))
        sample["sync_excess"] = sum(self.steps(STEPS_AFTER)) - usual * STEPS_AFTER
        sample["sync_cpu"] = self._cpu() - spent - cpu * STEPS_AFTER

    def _save_and_report(self) -> None:
        folder = self.scratch / f"reference-{dist.get_rank()}"
        # Rank 0 makes the folder of the tag, and every rank has its own here.
        (folder / f"global_step{self.engine.deepspeed.global_steps}").mkdir(parents=True)
        self.engine.deepspeed.save_checkpoint(str(folder))
        collectives.barrier()
        from ray.train._internal.storage import _pyarrow_fs_copy_files

        target, path = self._target()
        target.create_dir(path, recursive=True)
        _pyarrow_fs_copy_files(str(folder), path, destination_filesystem=target)
        collectives.barrier()
        shutil.rmtree(folder)

    def _target(self) -> tuple[FileSystem, str]:
        if self.uri.startswith("s3://"):
            system = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region=os.environ["AWS_REGION"])
            return system, f"{self.uri.removeprefix('s3://')}/reference"
        return FileSystem.from_uri(f"{self.uri}/reference")

    def round(self, number: int) -> dict[str, float]:
        """All arms; which of the two goes first changes."""
        sample: dict[str, float] = {}
        arms = [self.ours, self.synchronous]
        for arm in arms if number % 2 else reversed(arms):
            cpu = self._cpu()
            usual = statistics.median(self.steps(STEPS_BEFORE))
            cpu = (self._cpu() - cpu) / STEPS_BEFORE
            sample["step"] = usual
            sample["memcpy"] = self.memcpy()
            arm(sample, usual, cpu)
        sample["bytes"] = self.staged.size if self.staged else 0
        return sample


def main(uri: str, scratch: str, out: str, rounds: str) -> None:
    bench = Bench(uri, Path(scratch))
    samples = []
    # The first round touches all memory for the first time: it is thrown away.
    for number in range(int(rounds) + 1):
        sample = bench.round(number)
        if dist.get_rank() == 0:
            print(f"round {number}: {json.dumps(sample)}", file=sys.stderr, flush=True)
        samples += [sample] if number else []
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(samples))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
