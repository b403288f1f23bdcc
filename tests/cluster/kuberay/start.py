"""KubeRay for the disposable cluster: the executable that DSFT_KUBERAY_BIN names, else the stand-in.

Where the two differ, the stand-in is wrong: the same tests run on both.
"""

import json
import os
import sys
from pathlib import Path

from tests.cluster.control_plane import LOOPBACK, ControlPlane
from tests.cluster.crds import ROOT
from tests.cluster.processes import Process, answers, free_ports

_START_SECONDS = 60.0


def start_kuberay(plane: ControlPlane, folder: Path) -> Process:
    """Start it, with all rights, as a process that stays. The RayCluster CRD must be installed."""
    env = {"KUBECONFIG": str(plane.admin)}
    executable = os.environ.get("DSFT_KUBERAY_BIN")
    if not executable:
        # Its modules are found from the root of the checkout.
        env["PYTHONPATH"] = str(ROOT)
        return Process.start(folder, "kuberay", [sys.executable, "-m", "tests.cluster.kuberay"], env=env, stays=True)
    # It also watches these, and does not start without them.
    for kind in ("RayJob", "RayService"):
        plane.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(_empty_crd(kind)))
    metrics, probe = free_ports(2)
    argv = [
        executable,
        "--enable-leader-election=false",
        f"--metrics-addr={LOOPBACK}:{metrics}",
        f"--health-probe-bind-address={LOOPBACK}:{probe}",
    ]
    process = Process.start(folder, "kuberay", argv, env=env, stays=True)
    process.wait_until(lambda: answers(f"http://{LOOPBACK}:{probe}/healthz"), _START_SECONDS)
    return process


def _empty_crd(kind: str) -> dict[str, object]:
    """A CustomResourceDefinition that takes anything."""
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.ray.io"},
        "spec": {
            "group": "ray.io",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "scope": "Namespaced",
            "versions": [{**version, "schema": {"openAPIV3Schema": anything}}],
        },
    }
