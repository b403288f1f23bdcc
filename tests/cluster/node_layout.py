"""Where the disposable cluster lives: its addresses, and its folders on this machine. There is one cluster per machine.

198.18.0.0/15 is set aside for tests of networks (RFC 2544), so no real host has these addresses. All stays on the machine.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.build import cache_folder

ADDRESS = "198.18.0.1"  # the machine's own, on the bridge: API server, kubelet, DNS, S3
PODS = "198.18.0.0/24"
FIRST_POD, LAST_POD = "198.18.0.10", "198.18.0.250"
API_PORT = 6443
BRIDGE = "kube0"
NETWORK = "dsft-test"
NODE = "test-node"
CLUSTER_DOMAIN = "cluster.local"

REGISTRY_ADDRESS = "127.0.0.1:5000"
# A name that only this cluster's containerd knows: it leads to the address above.
REGISTRY = "registry.test"

FAKE_GPUS = 8


@dataclass(frozen=True)
class Folders:
    """What a cluster has on disk. `state` goes away with the cluster; the rest is kept, so that the next is up in seconds."""

    # Fixed, not in a cache that the environment chooses: the next run must find what a killed one left.
    state: Path = Path("/var/lib/dsft-test-cluster")

    @property
    def lock(self) -> Path:
        return self.state.with_suffix(".lock")

    @property
    def control_plane(self) -> Path:
        return self.state / "control-plane"

    @property
    def kubelet(self) -> Path:
        return self.state / "kubelet"

    @property
    def pod_logs(self) -> Path:
        return self.state / "pod-logs"

    @property
    def cni(self) -> Path:
        return self.state / "cni"

    @property
    def runtime(self) -> Path:
        """Of the running containers: mounts and sockets."""
        return self.state / "containerd"

    @property
    def socket(self) -> Path:
        return self.state / "containerd.sock"

    @property
    def s3(self) -> Path:
        return self.state / "s3"

    @property
    def kept_containerd(self) -> Path:
        return cache_folder() / "images" / "containerd"

    @property
    def kept_registry(self) -> Path:
        return cache_folder() / "images" / "registry"

    @property
    def kept_buildah(self) -> Path:
        return cache_folder() / "images" / "buildah"


FOLDERS = Folders()
