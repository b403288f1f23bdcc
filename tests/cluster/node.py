"""The node: kubelet, kube-proxy, scheduler and DNS, as processes of this machine on the bridge's address.

`tests/cluster/up.py` starts it beside the control plane. What each setting is for is said where it is set.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import LOOPBACK, ControlPlane
from tests.cluster.node_layout import ADDRESS, CLUSTER_DOMAIN, FAKE_GPUS, FOLDERS, NODE, PODS
from tests.cluster.processes import Process, answers, free_ports

_START_SECONDS = 60.0


def start_node(plane: ControlPlane, program: Path, coredns: Path) -> None:
    """Start everything but containerd; returns when the node is Ready and shows its fake GPUs."""
    _start_coredns(plane, coredns)
    _start_scheduler(plane, program)
    _start_kube_proxy(plane, program)
    _start_kubelet(plane, program)
    plane.kubectl("wait", "--for=create", f"node/{NODE}", "--timeout=30s")
    plane.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=50s")
    # The scheduler and the kubelet honour a resource that nobody provides. Its share for pods would follow in minutes.
    gpus = [
        {"op": "add", "path": f"/status/{field}/nvidia.com~1gpu", "value": str(FAKE_GPUS)}
        for field in ("capacity", "allocatable")
    ]
    plane.kubectl("patch", "node", NODE, "--subresource=status", "--type=json", f"--patch={json.dumps(gpus)}")


def _start_kubelet(plane: ControlPlane, program: Path) -> None:
    serving = plane.authority.issue("kubelet", NODE, hosts=[ADDRESS, NODE])
    (health,) = free_ports(1)
    config = {
        "kind": "KubeletConfiguration",
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "address": ADDRESS,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": False},
            "x509": {"clientCAFile": str(plane.authority.certificate)},
        },
        "authorization": {"mode": "AlwaysAllow"},
        "tlsCertFile": str(serving.certificate),
        "tlsPrivateKeyFile": str(serving.key),
        "containerRuntimeEndpoint": f"unix://{FOLDERS.socket}",
        # Neither systemd nor a cgroup of our own for each class of service: a test machine may have neither.
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        # Pods know the cluster's DNS only: outside there is nothing for them.
        "resolvConf": "",
        "clusterDNS": [ADDRESS],
        "clusterDomain": CLUSTER_DOMAIN,
        "podLogsDir": str(FOLDERS.pod_logs),
        # Test machines are full; images are few and wanted.
        "imageGCHighThresholdPercent": 99,
        "imageGCLowThresholdPercent": 98,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "healthzBindAddress": LOOPBACK,
        "healthzPort": health,
    }
    argv = [
        *(program, "kubelet"),
        f"--config={_write('kubelet', config)}",
        f"--kubeconfig={plane.kubeconfig('kubelet', f'system:node:{NODE}', ['system:nodes'])}",
        f"--root-dir={FOLDERS.kubelet}",
        f"--cert-dir={FOLDERS.kubelet / 'pki'}",
        f"--hostname-override={NODE}",
        f"--node-ip={ADDRESS}",
    ]
    _start("kubelet", argv, f"http://{LOOPBACK}:{health}/healthz")


def _start_kube_proxy(plane: ControlPlane, program: Path) -> None:
    health, metrics = free_ports(2)
    config = {
        "kind": "KubeProxyConfiguration",
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "mode": "iptables",
        "clientConnection": {"kubeconfig": str(plane.kubeconfig("kube-proxy", "system:kube-proxy"))},
        "hostnameOverride": NODE,
        "bindAddress": ADDRESS,
        "clusterCIDR": PODS,
        "healthzBindAddress": f"{LOOPBACK}:{health}",
        "metricsBindAddress": f"{LOOPBACK}:{metrics}",
        # Pods share a bridge: an answer that went from pod to pod directly would not be translated back.
        "iptables": {"masqueradeAll": True},
        # These sysctls are the machine's.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    argv = [program, "kube-proxy", f"--config={_write('kube-proxy', config)}"]
    _start("kube-proxy", argv, f"http://{LOOPBACK}:{health}/livez")


def _start_scheduler(plane: ControlPlane, program: Path) -> None:
    (port,) = free_ports(1)
    kubeconfig = plane.kubeconfig("kube-scheduler", "system:kube-scheduler")
    argv = [
        *(program, "kube-scheduler"),
        f"--kubeconfig={kubeconfig}",
        f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}",
        f"--bind-address={LOOPBACK}",
        f"--secure-port={port}",
        "--leader-elect=false",
    ]
    _start("kube-scheduler", argv, f"https://{LOOPBACK}:{port}/healthz")


def _start_coredns(plane: ControlPlane, program: Path) -> None:
    (port,) = free_ports(1)
    # No plugin answers for other names: they are refused at once.
    corefile = FOLDERS.state / "Corefile"
    corefile.write_text(
        f".:53 {{\n"
        f"  bind {ADDRESS}\n"
        f"  errors\n"
        f"  ready {LOOPBACK}:{port}\n"
        f"  kubernetes {CLUSTER_DOMAIN} {{\n"
        f"    kubeconfig {plane.admin}\n"
        f"  }}\n"
        f"}}\n"
    )
    _start("coredns", [program, "-conf", corefile], f"http://{LOOPBACK}:{port}/ready")


def _start(name: str, argv: list[str | Path], ready: str) -> None:
    process = Process.start(FOLDERS.state, name, argv, stays=True)
    process.wait_until(lambda: answers(ready), _START_SECONDS)


def _write(name: str, config: Mapping[str, Any]) -> Path:
    path = FOLDERS.state / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path
