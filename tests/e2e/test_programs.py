"""The programs of examples/programs on a cluster, from an archive in storage: each loses a pod, and goes on from its commit.

With tiny models and data, which are in the archive too, behind the tests' shims for pods without GPUs.
"""

import hashlib
import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsft_api.conditions import FailureClass, Phase
from tests.e2e.breaking import workers
from tests.e2e.manifests import HEAD, pool
from tests.e2e.s3 import Bucket
from tests.e2e.tenant import Tenant
from tests.e2e.trial import lost
from tests.trainer.program_examples import EXAMPLES, PROBED, RANKS, Length, examples, manifest, put_assets

pytestmark = pytest.mark.long

# Long enough that none has ended before its pod is killed.
LENGTH = Length(commits=10, rows=256)


@pytest.fixture(scope="module")
def source(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """program.source: the examples, Lightning, which the trainer image has not, and what they train."""
    folder = tmp_path_factory.mktemp("source")
    code = folder / "code"
    put_assets(code, LENGTH)
    for file in (*EXAMPLES.glob("*.py"), *PROBED.glob("*.py")):
        shutil.copy(file, code)
    for name in ("lightning", "pytorch-lightning"):
        for file in importlib.metadata.files(name) or ():
            if file.suffix != ".pyc" and ".." not in file.parts:
                (code / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), code / file)
    archive = Path(shutil.make_archive(str(folder / "programs"), "gztar", code))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"archive": bucket.upload(archive, "assets/programs.tar.gz"), "digest": f"sha256:{digest}"}


@pytest.mark.parametrize("name", examples(LENGTH))
def test_a_program_loses_a_pod_and_goes_on_from_its_commit(name: str, tenant: Tenant, source: dict[str, str]) -> None:
    document = on_cluster(manifest(name, LENGTH, Path()), source)
    run = document["metadata"]["name"]
    tenant.apply(document)
    tenant.until("a commit is told", lambda: committed(tenant, run))
    tenant.kubectl("delete", "pod", workers(tenant)[0], "--force", "--grace-period=0", "--wait=false")
    status = tenant.until_phase(run, Phase.SUCCEEDED)
    assert lost(status) == [FailureClass.WORKER_LOST]
    assert status.checkpoints is not None
    # None twice: what was committed was not trained again.
    assert [ref.step for ref in status.checkpoints.retained] == LENGTH.committed
    assert status.checkpoints.retained[-1].epoch == LENGTH.commits
    tenant.until_nothing_left()


def on_cluster(document: dict[str, Any], source: dict[str, str]) -> dict[str, Any]:
    """One rank per pod, in place of two on one machine. Storage and image are the admin's."""
    spec = document["spec"]
    spec["program"]["source"] = source
    if (trainer := spec["program"]["config"].get("trainer")) is not None:
        trainer |= {"devices": 1, "num_nodes": RANKS}
    env = [{"name": "HF_HUB_OFFLINE", "value": "1"}]
    return {**document, "spec": {**spec, "nodePools": [pool("cpu", RANKS)], "head": HEAD, "env": env}}


def committed(tenant: Tenant, name: str) -> bool:
    """Whether the status tells of a checkpoint of a run that goes on."""
    status = tenant.status(name)
    assert status.phase not in (Phase.FAILED, Phase.SUCCEEDED), f"{name} is {status.phase}: {status.message}"
    return status.checkpoints is not None and bool(status.checkpoints.retained)
