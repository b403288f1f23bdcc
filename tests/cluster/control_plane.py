"""etcd, kube-apiserver and kube-controller-manager as processes of ours, with RBAC on and a certificate for each client.

On loopback and free ports for tests that need an API server only; on an address that pods reach for a whole cluster.
`python -m tests.cluster.control_plane` runs one until Ctrl-C, to try things by hand.
"""

import contextlib
import ipaddress
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.cluster.build import kubernetes
from tests.cluster.certificates import Authority, KeyPair, new_key
from tests.cluster.crds import our_crds, raycluster_crd
from tests.cluster.processes import POLL_SECONDS, Process, answers, end_recorded, executable, free_ports
from tests.cluster.scratch import scratch_folder

LOOPBACK = "127.0.0.1"
SERVICES = "198.19.0.0/16"
START_SECONDS = 60.0
KUBECTL_SECONDS = 60.0


@dataclass
class ControlPlane:
    """A running API server. Its state is in `folder`; nothing is kept when it is started anew."""

    folder: Path
    host: str
    port: int
    authority: Authority
    stays: bool
    audited: Sequence[str] = ()
    processes: list[Process] = field(default_factory=list[Process])

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        program: Path | None = None,
        stays: bool = False,
        audited: Sequence[str] = (),
    ) -> "ControlPlane":
        """Start etcd and the API server; returns when it is ready, after a few seconds.

        Args:
            folder: for certificates, data, logs and kubeconfigs; made anew.
            host: address to listen on, of this machine.
            port: by default a free one.
            program: the binary with kube-apiserver; built if need be.
            stays: they outlive us; end them with `processes.end_recorded`.
            audited: users each of whose requests is a line of `audit_log`.
        """
        program = program or kubernetes()
        end_recorded(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        etcd, peer, api = free_ports(3)
        plane = cls(folder, host, port or api, Authority.create(folder / "pki"), stays, audited)
        try:
            plane._start_etcd(etcd, peer)
            plane._start_api_server(program, etcd)
        except BaseException:
            plane.stop()
            raise
        return plane

    @property
    def url(self) -> str:
        """Where the API server answers."""
        return f"https://{self.host}:{self.port}"

    @property
    def admin(self) -> Path:
        """A kubeconfig with all rights."""
        return self.kubeconfig("admin", "kubernetes-admin", ["system:masters"])

    @property
    def audit_log(self) -> Path:
        """What the audited users asked for and were answered: an audit.k8s.io/v1 Event per line, written before the answer."""
        return self.folder / "audit.log"

    def kubeconfig(self, file_name: str, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig for any user; made at the first call. RBAC says what the user may do."""
        path = self.folder / f"{file_name}.kubeconfig"
        if not path.exists():
            pair = self.authority.issue(file_name, user, groups)
            path.touch(mode=0o600)
            path.write_text(_kubeconfig(self.url, self.authority.certificate, pair))
        return path

    def kubectl(self, *arguments: str | Path, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """What kubectl prints, as admin or as the user of `kubeconfig`.

        Raises:
            RuntimeError: with what it said, if it fails.
        """
        done = subprocess.run(
            [
                *(executable("kubectl"), "--kubeconfig", kubeconfig or self.admin),
                # Not in the user's home.
                *("--cache-dir", self.folder / "kubectl-cache"),
                *arguments,
            ],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=KUBECTL_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def install(self, *manifests: Path) -> None:
        """Apply CustomResourceDefinitions, and wait until they are served."""
        files = [f"--filename={manifest}" for manifest in manifests]
        # Server-side: the RayCluster's is too large for the annotation of a client-side apply.
        self.kubectl("apply", "--server-side", *files)
        # Not `kubectl wait`: it ends with an error while the conditions of a new CRD are null.
        deadline = time.monotonic() + START_SECONDS
        while not self._are_established(files):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not served after {START_SECONDS:.0f} s: {', '.join(map(str, manifests))}")
            time.sleep(POLL_SECONDS)

    def _are_established(self, files: Sequence[str]) -> bool:
        found = json.loads(self.kubectl("get", "--output=json", *files))
        return all(
            any(each["type"] == "Established" and each["status"] == "True" for each in conditions)
            for each in found.get("items", [found])
            for conditions in [(each.get("status") or {}).get("conditions") or ()]
        )

    def start_controller_manager(self, *controllers: str, program: Path | None = None) -> Process:
        """Start kube-controller-manager with these controllers, or the usual ones; returns when it is ready.

        Install CRDs first: its garbage collector looks for new kinds only every 30 seconds.
        """
        (port,) = free_ports(1)
        user = "system:kube-controller-manager"
        kubeconfig = self.kubeconfig("kube-controller-manager", user)
        argv = [
            program or kubernetes(),
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--bind-address={LOOPBACK}",
            f"--secure-port={port}",
            f"--cert-dir={self.folder / 'kube-controller-manager'}",
            f"--controllers={','.join(controllers) or '*'}",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self._service_account_key}",
            f"--root-ca-file={self.authority.certificate}",
            f"--service-cluster-ip-range={SERVICES}",
            f"--cluster-signing-cert-file={self.authority.certificate}",
            f"--cluster-signing-key-file={self.authority.folder / 'ca.key'}",
        ]
        process = self._start("kube-controller-manager", argv)
        process.wait_until(lambda: answers(f"https://{LOOPBACK}:{port}/healthz"), START_SECONDS)
        return process

    def stop(self) -> None:
        """End all, the last started first, and remove the folder."""
        while self.processes:
            self.processes.pop().stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _service_account_key(self) -> Path:
        return self.authority.folder / "service-accounts.key"

    def _start(self, name: str, argv: Sequence[str | Path]) -> Process:
        process = Process.start(self.folder, name, argv, stays=self.stays)
        self.processes.append(process)
        return process

    def _start_etcd(self, port: int, peer_port: int) -> None:
        client, peer = (f"http://{LOOPBACK}:{each}" for each in (port, peer_port))
        argv = [
            executable("etcd"),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            # Nothing here is worth a wait for the disk.
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]
        self._start("etcd", argv).wait_until(lambda: answers(f"{client}/health"), START_SECONDS)

    def _start_api_server(self, program: Path, etcd_port: int) -> None:
        first_service = str(ipaddress.ip_network(SERVICES)[1])
        names = ("localhost", *(f"kubernetes{tail}" for tail in ("", ".default", ".default.svc")))
        hosts = {self.host, LOOPBACK, first_service, *names, "kubernetes.default.svc.cluster.local"}
        serving = self.authority.issue("kube-apiserver", "kube-apiserver", hosts=sorted(hosts))
        to_kubelet = self.authority.issue("kube-apiserver-kubelet-client", "kube-apiserver", ["system:masters"])
        new_key(self._service_account_key)
        argv = [
            program,
            "kube-apiserver",
            f"--etcd-servers=http://{LOOPBACK}:{etcd_port}",
            f"--bind-address={self.host}",
            f"--advertise-address={self.host}",
            f"--secure-port={self.port}",
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={self.authority.certificate}",
            f"--service-cluster-ip-range={SERVICES}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self._service_account_key}",
            f"--service-account-signing-key-file={self._service_account_key}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            # A node's name is in no DNS.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={to_kubelet.certificate}",
            f"--kubelet-client-key={to_kubelet.key}",
            # Pods find the server by the endpoints of its Service, which may not be a loopback address.
            f"--endpoint-reconciler-type={'none' if self.host == LOOPBACK else 'lease'}",
            *self._audit_options(),
        ]
        process = self._start("kube-apiserver", argv)
        process.wait_until(lambda: answers(f"{self.url}/readyz", ca=self.authority.certificate), START_SECONDS)

    def _audit_options(self) -> list[str]:
        if not self.audited:
            return []
        policy = self.folder / "audit-policy.yaml"
        # Who, what and the answer; no bodies. A watch has no end to be written at: it is written when it begins.
        rules = [{"level": "Metadata", "users": [*self.audited]}, {"level": "None"}]
        document = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"]}
        policy.write_text(yaml.safe_dump({**document, "rules": rules}))
        return [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]


def _kubeconfig(url: str, ca: Path, pair: KeyPair) -> str:
    cluster = {"server": url, "certificate-authority": str(ca)}
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    return yaml.safe_dump(config, sort_keys=False)


def main() -> None:
    """Run an API server with our CRDs until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with scratch_folder("dsft-control-plane-") as folder, contextlib.suppress(KeyboardInterrupt):
        plane = ControlPlane.start(folder / "plane")
        plane.install(*our_crds(), raycluster_crd())
        print(f"export KUBECONFIG={plane.admin}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
