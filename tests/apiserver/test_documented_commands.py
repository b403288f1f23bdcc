"""What the documents tell people to type is typed here, against a real API server: each command of kubectl, helm and dsft.

There is no kubelet, so no pod comes up: of Helm's commands `--wait` is left out (tests/e2e has it), and the operator that the
documents have installed is a process beside the server. What is shown elsewhere is named, with the test.
"""

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kubernetes.config import new_client_from_config

from dsft_operator.install import NAME, NAMESPACE
from tests.apiserver.fake_head import FakeHead
from tests.apiserver.preflights import ended
from tests.apiserver.scene import ROOT, Operator, Scene
from tests.apiserver.server import ApiServer, Runs
from tests.cluster.build import HELM
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import raycluster_crd
from tests.cluster.kuberay.controller import Standin
from tests.cluster.processes import executable
from tests.cluster.scratch import scratch_folder

pytestmark = pytest.mark.timeout(600)

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = ("kubectl", "helm", "dsft")
# Beginning of a command, and the test that does what it does.
ELSEWHERE = {
    "dsft run ": "tests/e2e/test_same_manifest.py",
    "dsft preflight ": "tests/cli/test_preflight.py",
    "dsft status ": "tests/cli/test_run.py",
    "dsft ls ": "tests/cli/test_run.py",
}
WATCH_SECONDS = 5.0


def documented() -> list[str]:
    """Every command of the pages, once, without comments and alternatives."""
    blocks = [block for page in PAGES for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL)]
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(re.sub(r"\s+", " ", line) for line in lines if line.startswith(PROGRAMS)))


@dataclass
class Terminal:
    """A shell of somebody who follows the documents."""

    folder: Path
    kubeconfig: Path
    left: list[str] = field(default_factory=documented)

    def types(self, beginning: str, *changes: tuple[str, str]) -> str:
        """Run the one documented command that begins so, with what each reader has to fill in; what it prints."""
        (command,) = [command for command in self.left if command.startswith(beginning)]
        self.left.remove(command)
        for what, instead in changes:
            assert what in command, f"{what} is not in {command}"
            command = command.replace(what, instead)
        done = self.run(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def watches(self, beginning: str) -> str:
        """Run a command that never ends, for some seconds; what it printed."""
        (command,) = [command for command in self.left if command.startswith(beginning)]
        self.left.remove(command)
        done = self.run(f"timeout {WATCH_SECONDS} {command}")
        assert done.returncode == 124, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """In the repository, with the programs of these tests."""
        tools = self.folder / "bin"
        tools.mkdir(exist_ok=True)
        for name, path in (("kubectl", executable("kubectl")), ("helm", HELM.built()), ("dsft", executable("dsft"))):
            if not (tools / name).exists():
                (tools / name).symlink_to(path)
        homes = {f"HELM_{kind.upper()}_HOME": f"{self.folder}/{kind}" for kind in ("cache", "config", "data")}
        known = {"PATH": f"{tools}:{os.environ['PATH']}", "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.folder)}
        return subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**os.environ, **homes, **known},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def api() -> Iterator[ApiServer]:
    """A server of its own, with KubeRay and without our CRD, which the documents install, and remove."""
    with scratch_folder("dsft-documents-") as folder:
        plane = ControlPlane.start(folder / "plane")
        plane.install(raycluster_crd())
        plane.start_controller_manager(
            "garbage-collector-controller", "namespace-controller", "serviceaccount-controller", "job-controller"
        )
        with new_client_from_config(str(plane.admin)) as client:
            standin = Standin(new_client_from_config(str(plane.admin)), mark_ready=lambda _: "127.0.0.1")
            thread = threading.Thread(target=standin.run, daemon=True)
            thread.start()
            with ended(new_client_from_config(str(plane.admin))):
                yield ApiServer(plane, client)
            standin.stop()
            thread.join(30)
        plane.stop()


def test_each_documented_command_does_what_it_says(api: ApiServer, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, api.kubeconfig)
    terminal.types("kubectl apply --server-side -f crds/")
    terminal.types("kubectl apply -f examples/install/operator.yaml")
    terminal.types("dsft validate -f examples/quickstart.yaml")
    _runs(api, terminal, tmp_path)
    api.make_namespace("argocd")
    terminal.run("kubectl -n argocd create configmap argocd-cm")
    terminal.types("kubectl -n argocd patch configmap argocd-cm")
    terminal.types("kubectl delete crd deepspeedfinetunes.dsft.dev")
    terminal.run("kubectl delete -f examples/install/operator.yaml --wait=true")
    _releases(terminal)
    left = [command for command in terminal.left if not command.startswith(tuple(ELSEWHERE))]
    assert left == [], "documented, and never typed"
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def _runs(api: ApiServer, terminal: Terminal, folder: Path) -> None:
    """A first run, and what an admin does with runs."""
    terminal.types("kubectl create namespace ml")
    terminal.types("kubectl -n ml create secret generic s3")
    terminal.types("kubectl -n ml apply -f examples/quickstart.yaml")
    head = FakeHead()
    user = f"system:serviceaccount:{NAMESPACE}:{NAME}"
    account = api.plane.kubeconfig("operator", user, ["system:serviceaccounts", "system:authenticated"])
    operator = Operator(folder, account, "ml", head.start())
    operator.options = {"storage": {"uri": "s3://bucket/runs"}, "leaderElection": {"enabled": True}}
    scene = Scene(api, Runs(api.client, "ml"), operator, head, name="verse-paraphrase")
    operator.start()
    try:
        assert "verse-paraphrase" in terminal.watches("kubectl -n ml get dsft -w")
        assert "condition met" in terminal.types("kubectl -n ml wait --for=condition=Succeeded", ("1h", "100s"))
        assert "dsft-operator" in terminal.types("kubectl -n dsft-system get lease")
        scene.until("cluster freed", lambda: not scene.clusters())
        # With no operator, as that section says.
        operator.kill()
        terminal.types('kubectl -n ml patch dsft verse-paraphrase --type=merge -p \'{"spec": {"retry"')
        assert scene.runs.get(scene.name)["spec"]["retry"]["token"] == "2"
        scene.runs.delete(scene.name)
        assert scene.exists(), "its finalizer holds it"
        terminal.types("kubectl -n NAMESPACE patch dsft NAME", ("NAMESPACE", "ml"), ("NAME", scene.name))
        assert not scene.exists()
        scene.apply()
        operator.start()
        scene.until("taken up", lambda: scene.status().get("phase") is not None)
        terminal.types("kubectl delete deepspeedfinetunes --all --all-namespaces")
        assert not scene.exists()
    finally:
        if operator.process is not None:
            operator.kill()
        head.stop()


def _releases(terminal: Terminal) -> None:
    """Install, upgrade and uninstall; nothing waits, since no pod comes up here."""
    unwaited = (" --wait", "")
    assert "STATUS: deployed" in terminal.types("helm install dsft charts/dsft-operator", unwaited)
    assert "has been upgraded" in terminal.types("helm upgrade dsft charts/dsft-operator", unwaited)
    assert "uninstalled" in terminal.types("helm uninstall dsft", unwaited)
    assert terminal.run("kubectl get crd deepspeedfinetunes.dsft.dev").returncode == 0, "the runs' definition is kept"
