"""The secrets that a run on a cluster uses, looked for in all that it leaves: objects, events, logs, Ray's files, storage."""

import base64
import secrets
from pathlib import Path

import pytest

from dsft_api.conditions import Phase
from dsft_operator.config import OperatorConfig
from dsft_operator.core.submission import CHANNEL
from tests.cluster.operator_install import NAMESPACE, Install
from tests.e2e.manifests import Assets, tiny_run
from tests.e2e.tenant import Tenant
from tests.secret_scan import findings, objects, outside

pytestmark = pytest.mark.long
NAME = "discreet"
KEEP_SECONDS = 900
# On the head: what Ray tells of its jobs, and all that it wrote down.
_TELL = """
import glob, os, sys, urllib.request as http
request = http.Request("http://127.0.0.1:8265/api/jobs/", headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(http.urlopen(request, timeout=30).read().decode())
for path in glob.glob(os.path.join(sys.argv[1], "**"), recursive=True):
    if os.path.isfile(path):
        print(path, open(path, errors="replace").read())
"""


def test_no_secret_of_a_run_is_told(tenant: Tenant, operator: Install, assets: Assets) -> None:
    planted = _plant(tenant)
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
    edits = {
        "spec.env": env,
        "spec.envFrom": [{"secretRef": {"name": "tracker"}}],
        "spec.keepClusterSeconds": KEEP_SECONDS,
    }
    tenant.apply(tiny_run(NAME, assets, steps=6, edits=edits))
    status = tenant.until_phase(NAME, Phase.SUCCEEDED)
    assert status.ray_cluster is not None
    planted["Ray token"] = _secret(tenant, tenant.namespace, status.ray_cluster.name, "auth_token")
    planted["root key"] = _secret(tenant, NAMESPACE, OperatorConfig().root_key_secret, "key")
    told = {**objects(tenant.kubectl, tenant.namespace, NAMESPACE), **_logs(tenant), **_files(tenant)}
    session = str(Path(CHANNEL).parent)
    told["Ray's head"] = tenant.kubectl(
        *("exec", tenant.head(NAME), "--container=ray-head", "--", "python", "-c", _TELL, session)
    )
    assert "submission_id" in told["Ray's head"]
    found = findings(told, planted)
    assert {name for _, name, _ in found} == planted.keys(), "the search sees the Secrets themselves"
    print(f"{len(planted)} values looked for in {len(told)} texts, {sum(map(len, told.values())) / 1e6:.0f} MB")
    assert not outside(found)
    tenant.patch(NAME, keepClusterSeconds=0)
    tenant.own_secrets.extend(["hub", "tracker"])
    tenant.until_nothing_left()


def _plant(tenant: Tenant) -> dict[str, str]:
    planted = {"hub": secrets.token_urlsafe(24), "tracker": secrets.token_urlsafe(24)}
    for name, value in planted.items():
        key = "token" if name == "hub" else "WANDB_API_KEY"
        tenant.kubectl("create", "secret", "generic", name, f"--from-literal={key}={value}")
    return {**planted, "S3 key": tenant.storage.secret_key}


def _secret(tenant: Tenant, namespace: str, name: str, key: str) -> str:
    data = tenant.kubectl.within(namespace).read("secret", name)["data"]
    return base64.b64decode(data[key]).decode()


def _logs(tenant: Tenant) -> dict[str, str]:
    """Of every container of the run and of the operator."""
    told: dict[str, str] = {}
    for namespace in (tenant.namespace, NAMESPACE):
        kubectl = tenant.kubectl.within(namespace)
        for pod in kubectl.read("pods")["items"]:
            name = pod["metadata"]["name"]
            told[f"log of {name}"] = kubectl("logs", name, "--all-containers", "--tail=-1")
    return told


def _files(tenant: Tenant) -> dict[str, str]:
    """Of the run in storage, byte by byte."""
    store = tenant.store(NAME)
    files = {entry.key: store.get_bytes(entry.key) or b"" for entry in store.list()}
    assert any(key.startswith("logs/") for key in files)
    return {f"file {key}": content.decode("latin-1") for key, content in files.items()}
