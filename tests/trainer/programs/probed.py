"""A program of the examples, with a witness of what DeepSpeed makes of its model. Run by dsft: config.probed.program names it.

At its end each rank writes RANK.json into the folder `config.probed.out`, if there is one: ZeRO stage, optimizer steps, and of
each parameter its whole size and this rank's share. Paths of model and data begin in the folder of this module.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

Config = dict[str, Any]
HERE = Path(__file__).parent


def datasets(config: Config) -> Any:
    return importlib.import_module(config["probed"]["program"]).datasets(found(config))


def train_func(config: Config) -> None:
    probe = config.pop("probed")
    engines: list[DeepSpeedEngine] = []
    watch_engines(engines)
    if probe["program"] == "lightning_lm":
        let_lightning_run_on_cpu()
    if probe["program"] in ("accelerate_lm", "transformers_trainer"):
        let_accelerate_see_ranks_on_cpu()
    importlib.import_module(probe["program"]).train_func(found(config))
    (engine,) = engines
    if "out" not in probe:
        return
    facts = {
        "stage": engine.zero_optimization_stage(),
        "steps": engine.global_steps,
        "parameters": [[p.ds_numel, p.ds_tensor.numel()] for p in engine.module.parameters() if hasattr(p, "ds_id")],
        "whole": [name for name, p in engine.module.named_parameters() if not hasattr(p, "ds_id")],
    }
    (Path(probe["out"]) / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))


def found(config: Config) -> Config:
    """The same, with whole paths."""
    data = config["data"]
    files = str(HERE / data["data_files"])
    return {**config, "model": str(HERE / config["model"]), "data": {**data, "data_files": files}}


def watch_engines(engines: list[DeepSpeedEngine]) -> None:
    """Whoever makes an engine, and however."""
    make = DeepSpeedEngine.__init__

    def made(engine: DeepSpeedEngine, *arguments: Any, **named: Any) -> None:
        make(engine, *arguments, **named)
        engines.append(engine)

    DeepSpeedEngine.__init__ = made


def let_accelerate_see_ranks_on_cpu() -> None:
    """Test only: with DeepSpeed and without a GPU, Accelerate 1.15 takes each rank for the only one.

    DeepSpeed would cut the parameters over the ranks all the same, but each would train on all of the data.
    """
    from accelerate.state import PartialState

    prepare = PartialState._prepare_backend

    def prepared(state: PartialState, *arguments: Any, **named: Any) -> Any:
        backend, kind = prepare(state, *arguments, **named)
        return backend or "gloo", kind

    PartialState._prepare_backend = prepared


def let_lightning_run_on_cpu() -> None:
    """Test only: Lightning refuses its DeepSpeed strategy without CUDA, and asks DeepSpeed for a GPU by its index.

    What it does beyond that is the same on CPU.
    """
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.strategies import deepspeed as strategy

    strategy.DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
    strategy.DeepSpeedStrategy.root_device = property(lambda _self: torch.device("cpu", 0))
    strategy._validate_device_index_selection = lambda _devices: None
