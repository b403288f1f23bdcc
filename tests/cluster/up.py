"""One disposable Kubernetes per machine: `python -m tests.cluster.up` starts it and prints the kubeconfig's path; `--down`.

A second call finds it running. What a killed run left is cleared away first. With KUBECONFIG set nothing is started:
tests use that cluster, and the environment says what they can't find out (`in_use`).
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.cluster.build import COREDNS, kubernetes
from tests.cluster.control_plane import ControlPlane
from tests.cluster.crds import raycluster_crd
from tests.cluster.images import Images, build_and_push, start_registry
from tests.cluster.kuberay.start import start_kuberay
from tests.cluster.node import start_node
from tests.cluster.node_layout import ADDRESS, API_PORT, FOLDERS
from tests.cluster.node_lock import only_one
from tests.cluster.node_network import add_network, remove_network
from tests.cluster.node_packages import ensure_packages
from tests.cluster.node_runtime import remove_containers, start_containerd
from tests.cluster.node_s3 import BUCKET
from tests.cluster.processes import Process, answers, end_recorded, recorded
from tests.s3_server import ADMIN

KUBECONFIG = FOLDERS.control_plane / "admin.kubeconfig"
_PROCESSES = {
    FOLDERS.control_plane: {"etcd", "kube-apiserver", "kube-controller-manager"},
    FOLDERS.state: {"containerd", "coredns", "kube-proxy", "kube-scheduler", "kubelet", "kuberay", "registry", "s3"},
}
T = TypeVar("T")
_UP = FOLDERS.state / "up"
_S3_SECONDS = 60.0


@dataclass(frozen=True)
class Storage:
    """An S3 server that pods and tests reach at the same endpoint."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Cluster:
    """The cluster that tests use. `disposable` is false where it is somebody else's, named by KUBECONFIG."""

    kubeconfig: Path
    storage: Storage
    disposable: bool


def in_use(env: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that KUBECONFIG names, with the storage that the environment names; else ours, started if need be.

    With KUBECONFIG: DSFT_S3_ENDPOINT, DSFT_S3_BUCKET, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY name the storage. The
    cluster has KubeRay.

    Raises:
        RuntimeError: a variable is missing, or the cluster did not start.
    """
    if not _is_foreign(env):
        up()
        return Cluster(KUBECONFIG, _own_storage(), disposable=True)
    names = ("DSFT_S3_ENDPOINT", "DSFT_S3_BUCKET", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return Cluster(Path(env["KUBECONFIG"]), Storage(*_required(env, names)), disposable=False)


def images_in_use(env: Mapping[str, str] = os.environ) -> Images:
    """This checkout's images, built and pushed to our cluster's registry; what the environment names for another cluster.

    With KUBECONFIG: DSFT_OPERATOR_IMAGE and DSFT_TRAINER_IMAGE are what the cluster pulls.
    """
    if not _is_foreign(env):
        with only_one():
            return build_and_push()
    return Images(*_required(env, ("DSFT_OPERATOR_IMAGE", "DSFT_TRAINER_IMAGE")))


def up() -> None:
    """Start the cluster, unless it runs. Minutes on a new machine, then seconds.

    Raises:
        RuntimeError: with the end of the log of the part that did not start. What had started is ended.
    """
    with only_one():
        if _runs():
            return
        _clear()
        try:
            _start()
        except BaseException:
            # Logs are what tells why.
            _end_processes()
            raise


def down() -> None:
    """End the cluster and remove all of it but the caches, whatever state it is in."""
    with only_one():
        _clear()


def _start() -> None:
    _timed("packages", ensure_packages)
    program = _timed("Kubernetes", lambda: kubernetes(node=True))
    coredns = _timed("CoreDNS", COREDNS.built)
    FOLDERS.state.mkdir(parents=True)
    _timed("network", add_network)
    _timed("registry", start_registry)
    _timed("S3", _start_s3)
    plane = _timed(
        "API server",
        lambda: ControlPlane.start(FOLDERS.control_plane, host=ADDRESS, port=API_PORT, program=program, stays=True),
    )
    _timed("CRDs", lambda: plane.install(raycluster_crd()))
    _timed("controllers", lambda: plane.start_controller_manager(program=program))
    _timed("containerd", start_containerd)
    _timed("node", lambda: start_node(plane, program, coredns))
    _timed("KubeRay", lambda: start_kuberay(plane, FOLDERS.state))
    _UP.touch()


def _start_s3() -> None:
    argv = [sys.executable, "-m", "tests.cluster.node_s3", ADDRESS, FOLDERS.s3]
    root = str(Path(__file__).resolve().parents[2])
    process = Process.start(FOLDERS.state, "s3", argv, env={"PYTHONPATH": root}, stays=True)
    process.wait_until(_s3_endpoint_file().exists, _S3_SECONDS)


def _s3_endpoint_file() -> Path:
    return FOLDERS.s3 / "endpoint"


def _own_storage() -> Storage:
    return Storage(_s3_endpoint_file().read_text(), BUCKET, ADMIN.access_key, ADMIN.secret_key)


def _runs() -> bool:
    """Whether a cluster came up whole, and nothing of it has ended since."""
    alive = all(names <= recorded(folder).keys() for folder, names in _PROCESSES.items())
    return _UP.exists() and alive and api_server_answers()


def api_server_answers() -> bool:
    """Whether the cluster's API server is ready."""
    return answers(f"https://{ADDRESS}:{API_PORT}/readyz")


def _clear() -> None:
    _end_processes()
    remove_network()
    shutil.rmtree(FOLDERS.state, ignore_errors=True)
    if FOLDERS.state.exists():
        raise RuntimeError(f"{FOLDERS.state} can't be removed: is something mounted in it?")


def _end_processes() -> None:
    # The kubelet first, or it would start again what ends.
    for folder in reversed(_PROCESSES):
        if folder.exists():
            end_recorded(folder)
    remove_containers()


def _is_foreign(env: Mapping[str, str]) -> bool:
    return bool(env.get("KUBECONFIG")) and Path(env["KUBECONFIG"]) != KUBECONFIG


def _required(env: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    if missing := [name for name in names if not env.get(name)]:
        raise RuntimeError(f"KUBECONFIG names a cluster, so {', '.join(missing)} must be set too")
    return [env[name] for name in names]


def _timed(part: str, start: Callable[[], T]) -> T:
    begun = time.monotonic()
    result = start()
    print(f"tests.cluster: {part} in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Up, or down."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.up", description=__doc__)
    parser.add_argument("--down", action="store_true", help="end the cluster; caches stay")
    options = parser.parse_args()
    if options.down:
        down()
        return
    cluster = in_use()
    print(json.dumps({"endpoint": cluster.storage.endpoint, "bucket": cluster.storage.bucket}), file=sys.stderr)
    print(cluster.kubeconfig)


if __name__ == "__main__":
    main()
