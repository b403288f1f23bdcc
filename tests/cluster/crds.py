"""The CustomResourceDefinitions that the tests install: ours, and KubeRay's RayCluster.

KubeRay's own is too large to keep here. Where it cannot be had, a small one takes any spec.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def our_crds() -> list[Path]:
    """The generated CRDs of this checkout."""
    return sorted((ROOT / "crds").glob("*.yaml"))


def raycluster_crd() -> Path:
    """The real one, named by $DSFT_RAYCLUSTER_CRD or beside the checkout; else one that knows no field of the spec.

    Raises:
        FileNotFoundError: $DSFT_RAYCLUSTER_CRD names no file; or a real KubeRay, which relies on its CRD's defaults, would get
            the small one.
    """
    if named := os.environ.get("DSFT_RAYCLUSTER_CRD"):
        return Path(named).resolve(strict=True)
    real = ROOT.parent / "shared" / "kuberay" / "ray.io_rayclusters.yaml"
    if not real.is_file() and os.environ.get("DSFT_KUBERAY_BIN"):
        raise FileNotFoundError(
            "DSFT_KUBERAY_BIN needs its own CRD: set DSFT_RAYCLUSTER_CRD to its ray.io_rayclusters.yaml"
        )
    return real if real.is_file() else Path(__file__).with_name("raycluster_any_spec.yaml")
