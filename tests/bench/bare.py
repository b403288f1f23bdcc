"""What a practitioner writes without dsft: DeepSpeed under torchrun, no checkpoints, no metrics, fixed batches.

The floor that `tests.bench.launch` measures the distance to. Argument: a folder with `config.json` (DeepSpeed's), `model` (path)
and `rank-<r>.pt` (a list of batches). Prints `step N` when a step is done.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

deepspeed.ops.__compatible_ops__ = {}  # or it compiles for half a minute
from transformers import AutoModelForSequenceClassification  # noqa: E402
from transformers.integrations.deepspeed import set_hf_deepspeed_config  # noqa: E402


class Zero3:
    """transformers asks this whether to build the model in partitions."""

    def __init__(self, config: dict) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return True

    def is_zero2(self) -> bool:
        return False


folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
zero = Zero3(config)
set_hf_deepspeed_config(zero)
torch.manual_seed(42)
dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
model = AutoModelForSequenceClassification.from_pretrained((folder / "model").read_text(), dtype=dtype, num_labels=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for step, (inputs, labels) in enumerate(torch.load(folder / f"rank-{os.environ['RANK']}.pt"), start=1):
    logits = engine(**inputs).logits
    engine.backward(torch.nn.functional.cross_entropy(logits.float(), labels))
    engine.step()
    if os.environ["RANK"] == "0":
        print(f"step {step}", flush=True)
