"""Manifests of these tests: the quickstart as it is, and runs of a tiny model whose training takes seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli.command import edited
from tests.cluster.crds import ROOT
from tests.e2e.s3 import Bucket

Document = dict[str, Any]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
QUICKSTART_NAME = "verse-paraphrase"
# More than any test waits for.
ENDLESS = 1_000_000
HEAD = {"resources": {"requests": {"cpu": "200m", "memory": "512Mi"}, "limits": {"memory": "6Gi"}}}


@dataclass(frozen=True)
class Assets:
    """A model of a few thousand weights and 64 rows, where pods find them."""

    model: str
    data: str

    @classmethod
    def put(cls, bucket: Bucket, folder: Path) -> "Assets":
        """Make them in `folder`, and upload them."""
        # Takes transformers with it, seconds that a selection without these runs does not need.
        from tests.trainer import tiny

        model, data = tiny.bert(folder / "model"), tiny.dataset(folder, "classification")
        return cls(bucket.upload(model, "assets/model"), bucket.upload(data, f"assets/{data.name}"))


def tiny_run(
    name: str, assets: Assets, *, steps: int, nodes: int = 2, edits: Mapping[str, Any] | None = None
) -> Document:
    """A run on CPU pods. What is left out (storage, image) is the admin's. `edits`: other fields, by their paths."""
    manifest = {
        "apiVersion": "dsft.dev/v1alpha1",
        "kind": "DeepSpeedFineTune",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": assets.model, "task": "sequence-classification"},
            "data": {
                "train": {"uri": assets.data, "format": "classification"},
                "evalFraction": 0.25,
                "maxLength": 64,
            },
            "training": {
                "maxSteps": steps,
                "globalBatchSize": 8,
                "optimizer": {"learningRate": 1.0e-3},
                "schedule": {"type": "constant"},
                "precision": "fp32",
            },
            # By default once per epoch, which is 6 steps.
            "evaluation": {"everySteps": max(3, steps // 2)},
            "execution": {"device": "cpu", "microBatchSize": 4},
            "nodePools": [pool("cpu", nodes)],
            "head": HEAD,
            "checkpoint": {"everySteps": max(3, steps // 4)},
            "tracking": {"tensorboard": False},
            # Another pod that imports torch; its own tests and the quickstart have it.
            "preflight": {"enabled": False},
        },
    }
    return edited(manifest, edits or {})


def pool(name: str, nodes: int, **fields: Any) -> Document:
    """A pool whose pods ask for little, so that several runs fit, and for some, so that they get a share of busy cores.

    With a limit of memory Ray minds what the pod uses; without, what the whole machine does.
    """
    resources = {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}}
    return {"name": name, "nodes": nodes, "resources": resources, **fields}
