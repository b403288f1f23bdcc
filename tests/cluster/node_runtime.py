"""containerd, and the end of everything that it leaves running: its shims and their containers outlive it by design."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.images_pause import PAUSE_IMAGE, write_pause_archive
from tests.cluster.node_layout import FOLDERS, REGISTRY, REGISTRY_ADDRESS
from tests.cluster.node_network import CNI_PLUGINS
from tests.cluster.processes import Process

_START_SECONDS = 60.0
_CTR_SECONDS = 120
_END_SECONDS = 20.0

_CONFIG = f"""\
version = 2
root = "{FOLDERS.kept_containerd}"
state = "{FOLDERS.runtime}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{FOLDERS.socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
# Without CAP_SYS_RESOURCE no process may lower its score, and every sandbox would fail.
restrict_oom_score_adj = true
# So that what is mounted is found, and unmounted, in one folder.
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
# Compressed layers are in the registry, on the same disk.
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{FOLDERS.cni / "net.d"}"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{FOLDERS.state / "registries"}"
"""
_HOSTS = f"""\
server = "http://{REGISTRY_ADDRESS}"
[host."http://{REGISTRY_ADDRESS}"]
capabilities = ["pull", "resolve"]
"""


def start_containerd() -> Process:
    """Start it with the images of earlier clusters, but none of their containers; returns when it answers."""
    hosts = FOLDERS.state / "registries" / REGISTRY
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(_HOSTS)
    FOLDERS.kept_containerd.mkdir(parents=True, exist_ok=True)
    (FOLDERS.state / "containerd.toml").write_text(_CONFIG)
    process = _start()
    if old := ctr("containers", "list", "--quiet").split():
        ctr("containers", "delete", *old)
        # It knows them since its start.
        process.stop()
        process = _start()
    if PAUSE_IMAGE not in ctr("images", "list", "--quiet").split():
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "pause.tar"
            write_pause_archive(archive)
            ctr("images", "import", str(archive))
    return process


def ctr(*arguments: str) -> str:
    """What containerd's own client prints, for the images and containers that the kubelet sees."""
    argv = ["ctr", "--address", str(FOLDERS.socket), "--namespace", "k8s.io", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_CTR_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"ctr {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def remove_containers() -> None:
    """Kill what containerd left running, unmount what it and the kubelet mounted, and remove their cgroups.

    Call it when containerd and the kubelet have ended.
    """
    deadline = time.monotonic() + _END_SECONDS
    while left := _containers():
        for pid in left:
            _kill(pid)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} of the test cluster do not end")
        time.sleep(0.05)
    for mount in reversed(_mounts()):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True, timeout=60)
    for hierarchy in Path("/sys/fs/cgroup").glob("*"):
        for cgroup in (*hierarchy.glob("k8s.io/*/"), hierarchy / "k8s.io"):
            if cgroup.is_dir():
                _remove_cgroup(cgroup)


def _start() -> Process:
    process = Process.start(
        FOLDERS.state, "containerd", ["containerd", "--config", FOLDERS.state / "containerd.toml"], stays=True
    )
    process.wait_until(_answers, _START_SECONDS)
    return process


def _answers() -> bool:
    try:
        ctr("version")
    except (RuntimeError, subprocess.TimeoutExpired):
        return False
    return True


def _containers() -> list[int]:
    """The shims of our containerd, which its socket tells from others, and all that descends from them."""
    children: dict[int, list[int]] = {}
    found: list[int] = []
    for pid in _pids():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if fields[0] in "ZX":
            continue
        children.setdefault(int(fields[1]), []).append(pid)
        if b"containerd-shim" in command and str(FOLDERS.socket).encode() in command:
            found.append(pid)
    for pid in found:  # grows while it is read
        found.extend(children.get(pid, []))
    return found


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _mounts() -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1] for line in lines]
    ours = (FOLDERS.state, FOLDERS.kept_containerd, FOLDERS.kept_buildah)
    return [point for point in points if any(point.startswith(f"{folder}/") for folder in ours)]


def _remove_cgroup(cgroup: Path) -> None:
    try:
        cgroup.rmdir()
    except OSError:
        return  # of another containerd, or just being emptied
