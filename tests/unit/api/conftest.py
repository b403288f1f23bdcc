"""A right manifest, and a way to spoil it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

from dsft_api.problem import path_of

CAUSAL_LM: dict[str, Any] = {
    "apiVersion": "dsft.dev/v1alpha1",
    "kind": "DeepSpeedFineTune",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"uri": "hf://org/model", "task": "causal-lm"},
        "data": {
            "train": {"uri": "hf://org/data", "split": "train", "format": "messages"},
            "eval": {"split": "validation"},
        },
        "training": {"epochs": 3, "globalBatchSize": 64, "optimizer": {"learningRate": 1.0e-5}},
        "storage": {"uri": "s3://bucket/runs"},
        "nodePools": [{"name": "gpu", "nodes": 2, "gpusPerNode": 8}],
    },
}


@pytest.fixture
def manifest() -> Callable[[Mapping[str, Any]], str]:
    """The YAML of a right manifest after edits: {"spec.training.epochs": 0}; None takes the field out."""

    def edited(edits: Mapping[str, Any]) -> str:
        document = copy.deepcopy(CAUSAL_LM)
        for field, value in edits.items():
            *above, last = path_of(field)
            part: Any = document
            for name in above:
                part = part[name] if isinstance(name, int) else part.setdefault(name, {})
            if value is None:
                del part[last]
            else:
                part[last] = value
        return yaml.safe_dump(document, sort_keys=False)

    return edited
