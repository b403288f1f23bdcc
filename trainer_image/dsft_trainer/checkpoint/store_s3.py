"""The store on S3 or a server that speaks it.

Requests are retried one by one until a deadline, so an upload of many parts outlasts a server's restart without
beginning anew, and access errors surface at once.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from boto3.session import Session
from botocore.client import BaseClient
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from s3transfer.exceptions import RetriesExceededError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.utils import S3_RETRYABLE_DOWNLOAD_ERRORS
from tenacity import retry, retry_if_exception, retry_if_exception_type, stop_after_attempt
from typing_extensions import override

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint import backoff
from dsft_trainer.checkpoint.store import COMMIT, SMALL_BYTES, Entry, ObjectMissingError, Store, check_key
from dsft_trainer.errors import TrainerError

# One process alone reaches about 16 x 85 MB/s with these (AWS's figure per connection); ranks of a node add up.
PART_BYTES = 64 * 1024 * 1024
_CONNECTIONS = 16
_ANSWER_SECONDS = 60.0
_LONGEST_WAIT_SECONDS = 5.0
_WAIT = backoff.wait(_LONGEST_WAIT_SECONDS)
_STOP = stop_after_attempt(5)

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestTimeout",
        "ConditionalRequestConflict",
        "OperationAborted",
    }
)
_MISSING_CODES = frozenset({"NoSuchKey", "404"})

_BUCKET = "create the bucket, or correct spec.storage.uri and spec.storage.endpointUrl"
_KEYS = "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (spec.storage.credentials)"
_TOKEN = "renew the temporary credentials"  # noqa: S105
_POLICY = (
    "allow these credentials s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload"
)
_REGION = "correct spec.storage.region (or AWS_REGION)"
_REMEDIES = {
    "NoSuchBucket": _BUCKET,
    "InvalidBucketName": _BUCKET,
    "AccessDenied": _POLICY,
    "AllAccessDisabled": _POLICY,
    "403": _POLICY,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "ExpiredToken": _TOKEN,
    "InvalidToken": _TOKEN,
    "RequestTimeTooSkewed": "set this machine's clock",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "NotImplemented": "use an S3 server that has conditional writes (If-None-Match) and multipart uploads",
}


class S3Store(Store):
    """Objects below a prefix of a bucket. `Store` says what is promised.

    What a killed process uploaded in part is never visible, but takes space: have the bucket's lifecycle abort
    incomplete multipart uploads.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint_url: str | None,
        region: str | None,
        retry_seconds: float,
        answer_seconds: float = _ANSWER_SECONDS,
    ) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.bucket = bucket
        self.root = f"{prefix}/" if prefix else ""
        self._settings = (bucket, prefix, endpoint_url, region)
        self._patience = (retry_seconds, answer_seconds)
        self._connections: dict[int, tuple[BaseClient, TransferManager]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_connections": {}}

    @override
    def impatient(self) -> Self:
        bucket, prefix, endpoint_url, region = self._settings
        return type(self)(
            bucket, prefix, endpoint_url=endpoint_url, region=region, retry_seconds=3.0, answer_seconds=4.0
        )

    @override
    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._explained("write", key):
            try:
                self._client().put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
            except ClientError as error:
                if not if_absent or error.response["ResponseMetadata"].get("HTTPStatusCode") != 412:
                    raise
                # After a reply was lost, the object that is in the way may be our own.
                retried = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                return retried and self.get_bytes(key) == data
        return True

    @override
    def get_bytes(self, key: str, *, first: int | None = None) -> bytes | None:
        with self._explained("read", key):
            try:
                return self._read(self._key(key), {"Range": f"bytes=0-{first - 1}"} if first else {})
            except ClientError as error:
                if _code(error) in _MISSING_CODES:
                    return None
                raise

    @override
    def put_file(self, path: Path, key: str) -> None:
        with self._explained("write", key):
            self._upload(path, self._key(key))

    @override
    def get_file(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained("read", key):
            try:
                # s3transfer writes to a temporary name beside `path`.
                self._download(self._key(key), path)
            except ClientError as error:
                if _code(error) in _MISSING_CODES:
                    raise ObjectMissingError(self._place(key)) from error
                raise

    @override
    def folders(self) -> list[str]:
        with self._explained("list", ""):
            pages = self._client().get_paginator("list_objects_v2")
            found = [
                item["Prefix"].removeprefix(self.root).rstrip("/")
                for page in pages.paginate(Bucket=self.bucket, Prefix=self.root, Delimiter="/")
                for item in page.get("CommonPrefixes", ())
            ]
        return sorted(found)

    @override
    def list(self, prefix: str = "") -> list[Entry]:
        folder = check_key(prefix.rstrip("/")) + "/" if prefix else ""
        with self._explained("list", folder):
            pages = (
                self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.root + folder)
            )
            entries = [
                Entry(item["Key"].removeprefix(self.root), item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", ())
                # Consoles mark an empty folder with an object of that name.
                if not item["Key"].endswith("/")
            ]
        return sorted(entries, key=lambda entry: entry.key)

    @override
    def entry(self, key: str) -> Entry | None:
        with self._explained("read", key):
            try:
                found = self._client().head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if _code(error) in _MISSING_CODES:
                    return None
                raise
        return Entry(key, found["ContentLength"], found["ETag"].strip('"'))

    @override
    def delete(self, keys: Iterable[str]) -> None:
        # One request per key: servers differ in the checksum that a batch delete must carry.
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="store-delete") as pool:
            batch: list[str] = []
            for key in keys:
                if key.rpartition("/")[2] == COMMIT:
                    _drain(pool.map(self._delete, batch))
                    batch = []
                    self._delete(key)
                else:
                    batch.append(key)
            _drain(pool.map(self._delete, batch))

    def _delete(self, key: str) -> None:
        with self._explained("delete", key):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(key))

    # A body that breaks off is asked for again here; each request that asks has the client's own retries.
    @retry(retry=retry_if_exception_type(S3_RETRYABLE_DOWNLOAD_ERRORS), wait=_WAIT, stop=_STOP, reraise=True)
    def _read(self, key: str, part: Mapping[str, str]) -> bytes:
        return self._client().get_object(Bucket=self.bucket, Key=key, **part)["Body"].read()

    # s3transfer asks again as well, but without a pause, so its tries may all fall into one outage.
    @retry(retry=retry_if_exception_type(RetriesExceededError), wait=_WAIT, stop=_STOP, reraise=True)
    def _download(self, key: str, path: Path) -> None:
        self._transfers().download(self.bucket, key, str(path)).result()

    # A server that dies may forget an upload, or complete it and lose the reply: only a new one tells.
    @retry(retry=retry_if_exception(lambda error: _code(error) == "NoSuchUpload"), wait=_WAIT, stop=_STOP, reraise=True)
    def _upload(self, path: Path, key: str) -> None:
        size = path.stat().st_size
        if size < SMALL_BYTES:
            # From memory: before the body of a file, botocore asks the server whether to go on.
            self._client().put_object(Bucket=self.bucket, Key=key, Body=path.read_bytes())
        elif size < PART_BYTES:
            # One request, in this thread: the transfer manager would hand it from thread to thread.
            with path.open("rb") as body:
                self._client().put_object(Bucket=self.bucket, Key=key, Body=body)
        else:
            self._transfers().upload(str(path), self.bucket, key).result()

    def _key(self, key: str) -> str:
        return self.root + check_key(key)

    def _client(self) -> BaseClient:
        return self._connection()[0]

    def _transfers(self) -> TransferManager:
        return self._connection()[1]

    def _connection(self) -> tuple[BaseClient, TransferManager]:
        """One for each process, made on first use. Should two threads make one, both get the first."""
        connection = self._connections.get(os.getpid())
        if connection is None:
            _, _, endpoint_url, region = self._settings
            client = _make_client(endpoint_url, region, *self._patience)
            connection = self._connections.setdefault(os.getpid(), (client, _make_transfers(client)))
        return connection

    def _place(self, key: str) -> str:
        place = f"s3://{self.bucket}/{self.root}{key}"
        if os.getpid() not in self._connections:
            return place
        endpoint = urlsplit(self._client().meta.endpoint_url)
        # Without user and password, should somebody have put them into the URL.
        return f"{place} at {endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}"

    @contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Turn an error of boto3 into a TrainerError that says what to do, and shows no secret."""
        try:
            yield
        except (ClientError, BotoCoreError, RetriesExceededError, *S3_RETRYABLE_DOWNLOAD_ERRORS) as error:
            fault, remedy = _diagnose(error)
            denied = FailureClass.STORAGE_DENIED if remedy else FailureClass.UNKNOWN
            remedy = remedy or "check that the S3 endpoint is up and reachable (spec.storage.endpointUrl)"
            raise TrainerError(denied, f"cannot {action} {self._place(key)}: {fault}", remedy) from error


def _make_client(
    endpoint_url: str | None, region: str | None, retry_seconds: float, answer_seconds: float
) -> BaseClient:
    config = Config(
        connect_timeout=min(answer_seconds, 10.0),
        read_timeout=answer_seconds,
        tcp_keepalive=True,
        max_pool_connections=2 * _CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 1},
        # The digests in COMMIT.json guard the content from the rank's memory to the next load. Hashing every body
        # once more for the signature costs five times the CPU, and not every S3 server knows the newer checksums.
        s3={"payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # An own session: boto3's default one is not safe to share between threads while a client is made.
    try:
        client = Session().client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
    except ValueError as error:
        remedy = "write spec.storage.endpointUrl (or AWS_ENDPOINT_URL) as https://HOST or http://HOST:PORT"
        raise TrainerError(FailureClass.CONFIG_INVALID, f"S3 endpoint: {error}", remedy) from error
    client.meta.events.register_first("needs-retry.s3", _Retries(retry_seconds))
    return client


def _make_transfers(client: BaseClient) -> TransferManager:
    config = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_request_concurrency=_CONNECTIONS
    )
    return TransferManager(client, config)


class _Retries:
    """Retries each request for a bounded time after its first failure, with exponential backoff and jitter.

    botocore's own modes count attempts, and all requests of a client share one budget of them: parallel parts
    exhaust it within seconds of an outage.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(
        self,
        *,
        response: tuple[Any, dict[str, Any]] | None,
        caught_exception: Exception | None,
        attempts: int,
        request_dict: dict[str, Any],
        **_: object,
    ) -> float | None:
        """botocore's `needs-retry` hook: seconds to wait before the next attempt, or None to give up."""
        if not (_is_transient(caught_exception) if caught_exception else response and _is_transient_reply(*response)):
            return None
        now = time.monotonic()
        deadline = request_dict["context"].setdefault("dsft_retry_deadline", now + self.seconds)
        wait = backoff.jittered(attempts, _LONGEST_WAIT_SECONDS, first=0.2)
        return wait if now + wait < deadline else None


def _is_transient(error: Exception) -> bool:
    return isinstance(error, (ConnectionError, HTTPClientError)) and not _is_untrusted(error)


def _is_transient_reply(reply: Any, parsed: dict[str, Any]) -> bool:
    return reply.status_code in _TRANSIENT_STATUS or parsed.get("Error", {}).get("Code") in _TRANSIENT_CODES


def _is_untrusted(error: Exception) -> bool:
    return isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)


def _diagnose(error: Exception) -> tuple[str, str | None]:
    """What happened, and the remedy if waiting is none."""
    if isinstance(error, ClientError):
        code = _code(error)
        fault = f"{code}: {error.response['Error'].get('Message', 'no message')}"
        return fault, _REMEDIES.get(code)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return (
            "there are no complete credentials",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod's ServiceAccount a role",
        )
    if _is_untrusted(error):
        return "the endpoint's certificate is not trusted", "name its CA in spec.storage.caBundle (AWS_CA_BUNDLE)"
    if isinstance(error, (ParamValidationError, ProfileNotFound)):
        return str(error), "correct spec.storage.uri, or the AWS_* variables and files"
    # Not the text of the error itself: it repeats the endpoint as written, with what is in it.
    cause = error.kwargs.get("error") if isinstance(error, BotoCoreError) else error
    return f"no whole answer ({type(error).__name__}" + (f": {cause})" if cause else ")"), None


def _code(error: BaseException) -> str:
    return error.response["Error"].get("Code", "") if isinstance(error, ClientError) else ""


def _drain(results: Iterable[None]) -> None:
    for _ in results:
        pass
