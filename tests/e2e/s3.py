"""The session's folder in the bucket that pods and tests share."""

from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.client import BaseClient

from tests.cluster.up import Storage
from tests.s3_server import REGION


@dataclass(frozen=True)
class Bucket:
    """A prefix of the cluster's bucket."""

    storage: Storage
    prefix: str

    @property
    def uri(self) -> str:
        return f"s3://{self.storage.bucket}/{self.prefix}"

    def environment(self) -> dict[str, str]:
        """The variables by which boto3 and the trainer find it."""
        return {
            "AWS_ACCESS_KEY_ID": self.storage.access_key,
            "AWS_SECRET_ACCESS_KEY": self.storage.secret_key,
            "AWS_ENDPOINT_URL": self.storage.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def upload(self, path: Path, name: str) -> str:
        """A file, or all files of a folder, under a name below the prefix; its URI."""
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in files:
            below = "" if file == path else f"/{file.relative_to(path)}"
            self._client().upload_file(str(file), self.storage.bucket, f"{self.prefix}/{name}{below}")
        return f"{self.uri}/{name}"

    def download(self, uri: str, folder: Path) -> Path:
        """All files below a URI of this bucket, by a plain S3 client; the folder."""
        start = uri.removeprefix(f"s3://{self.storage.bucket}/") + "/"
        keys = self._keys(start)
        assert keys, f"there is nothing at {uri}"
        for key in keys:
            target = folder / key.removeprefix(start)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._client().download_file(self.storage.bucket, key, str(target))
        return folder

    def empty(self, below: str = "") -> None:
        """Delete what is below the prefix."""
        keys = self._keys(f"{self.prefix}/{below}".rstrip("/") + "/")
        for start in range(0, len(keys), 1000):
            doomed = [{"Key": key} for key in keys[start : start + 1000]]
            self._client().delete_objects(Bucket=self.storage.bucket, Delete={"Objects": doomed, "Quiet": True})

    def _keys(self, prefix: str) -> list[str]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.storage.bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def _client(self) -> BaseClient:
        return boto3.client(
            "s3",
            endpoint_url=self.storage.endpoint,
            region_name=REGION,
            aws_access_key_id=self.storage.access_key,
            aws_secret_access_key=self.storage.secret_key,
        )
