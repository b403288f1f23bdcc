"""The pods' network: one bridge with the node's own address, and CNI's `bridge` plugin on it.

The bridge is made first, because everything listens on its address. Nothing leaves the machine: no masquerading, and no
route but to pods, Services and the node.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.node_layout import ADDRESS, API_PORT, BRIDGE, FIRST_POD, FOLDERS, LAST_POD, NETWORK, PODS

CNI_PLUGINS = Path("/usr/lib/cni")
_SECONDS = 60
_PREFIX = PODS.partition("/")[2]
# Of kube-proxy, and of CNI's portmap.
_OUR_RULES = ("KUBE-", "CNI-")


def add_network() -> None:
    """Make the bridge and CNI's configuration."""
    remove_bridge()
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "address", "add", f"{ADDRESS}/{_PREFIX}", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    (FOLDERS.cni / "net.d").mkdir(parents=True)
    (FOLDERS.cni / "net.d" / "10-bridge.conflist").write_text(json.dumps(_cni_config(), indent=2))


def remove_network() -> None:
    """Take away bridge, addresses in use, and packet filter rules; nothing happens where there are none."""
    remove_bridge()
    for result in Path("/var/lib/cni/results").glob(f"{NETWORK}-*"):
        result.unlink()
    if shutil.which("iptables-save"):
        _remove_rules()


def remove_bridge() -> None:
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _run("ip", "link", "delete", BRIDGE)


@contextmanager
def cut_off(pod_address: str) -> Iterator[None]:
    """Drop what a pod sends to the API server, without a word to it, as in a network that is split."""
    rule = ("INPUT", "--source", pod_address, "--protocol", "tcp", "--dport", str(API_PORT), "--jump", "DROP")
    _run("iptables", "--insert", *rule)
    try:
        yield
    finally:
        _run("iptables", "--delete", *rule)


def _cni_config() -> dict[str, object]:
    pods = [{"subnet": PODS, "rangeStart": FIRST_POD, "rangeEnd": LAST_POD, "gateway": ADDRESS}]
    ipam = {
        "type": "host-local",
        "ranges": [pods],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": str(FOLDERS.cni / "addresses"),
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "ipMasq": False, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": NETWORK, "plugins": [bridge, portmap]}


def _remove_rules() -> None:
    saved = _run("iptables-save")
    kept = [line for line in saved.splitlines(keepends=True) if not any(name in line for name in _OUR_RULES)]
    if "".join(kept) != saved:
        _run("iptables-restore", stdin="".join(kept))


def _run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout
