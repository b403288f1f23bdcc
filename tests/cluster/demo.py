"""The quickstart on a cluster, as its user sees it: `python -m tests.cluster.demo`.

Starts the test cluster unless KUBECONFIG names another one, installs the operator, applies the example's own file, shows what
`kubectl get dsft -w` prints until the run is over, and says where the model is. All stays, to be looked at.
"""

import subprocess
import sys
import time
from uuid import uuid4

from dsft_api import PLURAL
from dsft_api.conditions import ConditionType
from dsft_api.status import FineTuneStatus
from tests.cluster.crds import ROOT
from tests.cluster.kubectl import Kubectl
from tests.cluster.operator_install import Install, tenant_namespace
from tests.cluster.up import images_in_use, in_use

FILE = ROOT / "examples" / "quickstart.yaml"
NAME = "verse-paraphrase"
SECONDS = 1800.0
POLL_SECONDS = 2.0


def main() -> int:
    """Exit code 0 if the run succeeded."""
    cluster, images = in_use(), images_in_use()
    kubectl = Kubectl(cluster.kubeconfig)
    Install.apply(kubectl, images, cluster.storage, f"s3://{cluster.storage.bucket}/demo")
    namespace = f"demo-{uuid4().hex[:4]}"
    kubectl.apply(*tenant_namespace(namespace, cluster.storage))
    mine = kubectl.within(namespace)

    say(f"export KUBECONFIG={cluster.kubeconfig}")
    say(f"kubectl -n {namespace} apply -f {FILE.relative_to(ROOT)}")
    print(mine("apply", "--filename", FILE), end="", flush=True)
    say(f"kubectl -n {namespace} get dsft -w")
    status = watch(mine)
    say(f"kubectl -n {namespace} get dsft {NAME} -o jsonpath={{.status.message}}")
    print(status.message)
    if status.output is None:
        return 1
    metrics = status.evaluation.metrics if status.evaluation else {}
    print("evaluation: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"exported model: {status.output.uri} ({status.output.bytes / 1e6:.0f} MB) at {cluster.storage.endpoint}")
    return 0


def watch(kubectl: Kubectl) -> FineTuneStatus:
    """Let kubectl print what changes, until the run is over or the time is; the last status."""
    with subprocess.Popen(kubectl.argv("get", PLURAL, NAME, "--watch")) as shown:
        deadline = time.monotonic() + SECONDS
        status = FineTuneStatus()
        while status.completion_time is None and not is_refused(status) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            status = FineTuneStatus.model_validate(kubectl.read(PLURAL, NAME).get("status") or {})
        shown.terminate()
    return status


def is_refused(status: FineTuneStatus) -> bool:
    """Whether it stands still: nothing will change before its user changes something."""
    return any(c.type is ConditionType.STALLED and c.status == "True" for c in status.conditions)


def say(command: str) -> None:
    """What a user would type."""
    print(f"\n$ {command}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
