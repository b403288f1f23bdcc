"""Kueue as a process beside an API server: its CRDs, and those of its webhooks that a RayCluster and its queues meet.

The API server calls the webhooks by URL, since no Service leads to a process. Kueue finds a certificate that is good for it
in its Secret, and so makes none of its own.
"""

import base64
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.build import KUEUE
from tests.cluster.certificates import KeyPair, self_signed
from tests.cluster.kubectl import Kubectl, KubectlError
from tests.cluster.processes import POLL_SECONDS, Process, answers, free_ports

NAMESPACE = "kueue-system"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_LOOPBACK = "127.0.0.1"
_SECRET = "kueue-webhook-server-cert"
# What Kueue asks of a certificate: the Service that others have, and the name of its own authority.
_NAMES = (_LOOPBACK, "kueue-webhook-service.kueue-system.svc", "kueue-ca")
_WEBHOOKS = ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration")
# The one kind of job that it manages here; all others have it watch what is not there.
_JOB = "ray.io/raycluster"
_START_SECONDS = 90.0
_END_SECONDS = 60.0
Document = dict[str, Any]


@dataclass(frozen=True)
class Kueue:
    """It runs."""

    kubectl: Kubectl
    process: Process

    def stop(self) -> None:
        """End it, and leave nothing that anybody could fail on: webhooks that nobody answers, objects that it must let go.

        Raises:
            RuntimeError: Workloads are left, whose RayClusters should be deleted before.
        """
        self._until_no_workloads()
        for kind in ("clusterqueues", "localqueues --all-namespaces", "workloadpriorityclasses", "topologies"):
            self.kubectl("delete", *kind.split(), "--all", f"--timeout={_END_SECONDS:.0f}s")
        self.kubectl("delete", "resourceflavors", "--all", f"--timeout={_END_SECONDS:.0f}s")
        ours = "--selector=app.kubernetes.io/name=kueue"
        self.kubectl("delete", *(",".join(kind.lower() for kind in _WEBHOOKS), ours))
        # Asked to stop, it takes longer than anybody would wait.
        self.process.kill()
        self.kubectl("delete", "crd", ours, f"--timeout={_END_SECONDS:.0f}s", seconds=2 * _END_SECONDS)
        self.kubectl("delete", "namespace", NAMESPACE, "--wait=false")

    def _until_no_workloads(self) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while left := self.kubectl("get", "workloads", "--all-namespaces", "--output=name"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"Workloads are left: {left}")
            time.sleep(POLL_SECONDS)


def start_kueue(kubectl: Kubectl, folder: Path) -> Kueue:
    """Install it and start it, as the user of `kubectl`, who may do anything. It dies with us. RayClusters are served.

    `folder` gets its certificate, settings and log.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pair = self_signed(folder / "certificates", _NAMES)
    webhooks, probe = free_ports(2)
    program = KUEUE.built()
    objects = list(_objects(program.with_name("config") / "default", kubectl, f"https://{_LOOPBACK}:{webhooks}"))
    kubectl.apply(_namespace(), _secret(pair), *objects)
    _wait_until_served(kubectl, [each["metadata"]["name"] for each in objects if _is_crd(each)])
    config = folder / "config.json"  # JSON is YAML
    config.write_text(json.dumps(_config(pair.key.parent, webhooks, probe)))
    argv = [program, f"--config={config}", "--feature-gates=VisibilityOnDemand=false"]
    process = Process.start(folder, "kueue", argv, env={"KUBECONFIG": str(kubectl.kubeconfig)})
    process.wait_until(lambda: answers(f"http://{_LOOPBACK}:{probe}/readyz"), _START_SECONDS)
    return Kueue(kubectl, process)


def _config(certificates: Path, webhooks: int, probe: int) -> Document:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": NAMESPACE,
        "health": {"healthProbeBindAddress": f"{_LOOPBACK}:{probe}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": _LOOPBACK, "port": webhooks, "certDir": str(certificates)},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": True},
        "manageJobsWithoutQueueName": False,
        "integrations": {"frameworks": [_JOB]},
    }


def _objects(folder: Path, kubectl: Kubectl, url: str) -> Iterator[Document]:
    """Of Kueue's own manifests: the CRDs, and the webhooks without those for jobs of other kinds."""
    text = kubectl("kustomize", folder)
    # By the C parser: a megabyte takes the other one half a minute.
    for document in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if _is_crd(document):
            if conversion := document["spec"].get("conversion"):
                conversion["webhook"]["clientConfig"] = {"url": f"{url}/convert"}
            yield document
        elif document["kind"] in _WEBHOOKS:
            yield {**document, "webhooks": [_by_url(hook, url) for hook in document["webhooks"] if _is_wanted(hook)]}


def _is_crd(document: Document) -> bool:
    return document["kind"] == "CustomResourceDefinition"


def _is_wanted(hook: Document) -> bool:
    (rule,) = hook["rules"]
    return rule["apiGroups"] == ["kueue.x-k8s.io"] or rule["resources"] == ["rayclusters"]


def _by_url(hook: Document, url: str) -> Document:
    (rule,) = hook["rules"]
    # Where jobs without a queue are not its business, it lets them pass; it need not be asked, nor be there.
    is_job = rule["resources"] == ["rayclusters"]
    queued = {"matchExpressions": [{"key": QUEUE_LABEL, "operator": "Exists"}]}
    selector = {"objectSelector": queued} if is_job else {}
    return {**hook, **selector, "clientConfig": {"url": f"{url}{hook['clientConfig']['service']['path']}"}}


def _namespace() -> Document:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}


def _secret(pair: KeyPair) -> Document:
    """The certificate is its own authority: whoever trusts it, trusts it."""
    certificate, key = (base64.b64encode(file.read_bytes()).decode() for file in (pair.certificate, pair.key))
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": _SECRET, "namespace": NAMESPACE},
        "data": {"tls.crt": certificate, "tls.key": key, "ca.crt": certificate, "ca.key": key},
    }


def _wait_until_served(kubectl: Kubectl, names: list[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _are_served(kubectl, names):
        if time.monotonic() > deadline:
            raise RuntimeError(f"not served after {_START_SECONDS:.0f} s: {', '.join(names)}")
        time.sleep(POLL_SECONDS)


def _are_served(kubectl: Kubectl, names: list[str]) -> bool:
    try:
        found = kubectl.read("crd", *names)["items"]
    except KubectlError:
        return False
    conditions = [
        {c["type"]: c["status"] for c in (each.get("status") or {}).get("conditions") or ()} for each in found
    ]
    return all(each.get("Established") == "True" for each in conditions)
