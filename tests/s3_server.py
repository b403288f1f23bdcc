"""A real S3 server for tests: SeaweedFS in one process, on free ports, with data in a folder of the test's own.

It can be killed and comes back on the same ports with the same data, and dies with the test process however that ends.
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.client import BaseClient
from botocore.exceptions import BotoCoreError, ClientError

from tests.cluster.processes import free_ports

REGION = "us-east-1"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Identity:
    """A pair of keys and what they may do."""

    name: str
    access_key: str
    secret_key: str
    actions: tuple[str, ...]


ADMIN = Identity("admin", "dsft-admin", "dsft-admin-secret", ("Admin", "Read", "Write", "List", "Tagging"))
READER = Identity("reader", "dsft-reader", "dsft-reader-secret", ("Read", "List"))


@dataclass
class S3Server:
    """SeaweedFS's master, volume server, filer and S3 gateway in one process."""

    folder: Path
    address: str = "127.0.0.1"
    ports: dict[str, int] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, folder: Path, address: str = "127.0.0.1", identities: Sequence[Identity] = (ADMIN, READER)
    ) -> "S3Server":
        """Start on free ports of an address of this machine with data in `folder`; returns when it answers."""
        (folder / "data").mkdir(parents=True)
        names = ("master", "volume", "filer", "s3")
        ports = free_ports(2 * len(names), address)
        server = cls(
            folder, address, {name: ports.pop() for part in names for name in (f"{part}.port", f"{part}.port.grpc")}
        )
        server.restart(identities)
        return server

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.ports['s3.port']}"

    def env(self, identity: Identity = ADMIN) -> dict[str, str]:
        """The environment variables by which boto3 finds this server."""
        return {
            "AWS_ACCESS_KEY_ID": identity.access_key,
            "AWS_SECRET_ACCESS_KEY": identity.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self) -> BaseClient:
        """A plain boto3 client with all rights."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ADMIN.access_key,
            aws_secret_access_key=ADMIN.secret_key,
        )

    def make_bucket(self, name: str) -> str:
        """Make a bucket (3 characters at least); its s3:// URI."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def stored_bytes(self) -> int:
        """Size of the volume files: what has arrived, visible or not."""
        return sum(path.stat().st_size for path in (self.folder / "data").glob("*.dat"))

    def kill(self) -> None:
        """SIGKILL, as when a machine goes away."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def restart(self, identities: Sequence[Identity] | None = None) -> None:
        """Start again on the same ports and data, with other identities if any are given; returns when it answers."""
        self.kill()
        if identities is not None:
            known = [
                {
                    "name": identity.name,
                    "credentials": [{"accessKey": identity.access_key, "secretKey": identity.secret_key}],
                    "actions": identity.actions,
                }
                for identity in identities
            ]
            (self.folder / "s3.json").write_text(json.dumps({"identities": known}))
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(self._argv(), cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "weed.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start (exit code {self.process.poll()}):\n{tail}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _argv(self) -> list[str]:
        weed = Path(sys.executable).with_name("weed")
        # The kernel kills the server with the thread that started it (use the main one), so a killed test run leaves
        # nothing behind.
        setpriv = shutil.which("setpriv")
        return [
            *([setpriv, "--pdeathsig", "KILL"] if setpriv else []),
            str(weed),
            "server",
            "-dir=data",
            f"-ip={self.address}",
            f"-ip.bind={self.address}",
            *(f"-{name}={port}" for name, port in self.ports.items()),
            "-s3",
            "-s3.config=s3.json",
            "-s3.autoCreateBucket=false",
            "-s3.iam=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            "-master.telemetry=false",
            # A cluster of one: no election, which takes 20 s after a kill.
            "-master.peers=none",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=0",
            "-volume.preStopSeconds=0",
        ]

    def _answers(self) -> bool:
        """Listing the buckets needs the filer; /healthz answers before it is there."""
        try:
            urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1).close()
            self.client().list_buckets()
        except (OSError, BotoCoreError, ClientError):
            return False
        return True
