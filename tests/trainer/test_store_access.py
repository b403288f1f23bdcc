"""What a store says when storage refuses, fails or is not there; and that the check before a run takes seconds."""

import errno
import math
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsft_api.conditions import FailureClass
from dsft_trainer.checkpoint.store import (
    Store,
    check_writable,
    open_store,
)
from dsft_trainer.errors import TrainerError
from tests.certificates import self_signed
from tests.s3_faults import faulty
from tests.s3_server import ADMIN, READER, Identity, S3Server


def denied(store: Store, *, within: float = 30.0) -> TrainerError:
    started = time.monotonic()
    with pytest.raises(TrainerError) as raised:
        check_writable(store)
    assert time.monotonic() - started < within
    assert raised.value.failure_class is FailureClass.STORAGE_DENIED
    assert store.uri in raised.value.message
    for secret in (ADMIN.secret_key, READER.secret_key, "not-the-secret"):
        assert secret not in str(raised.value)
    return raised.value


@pytest.mark.parametrize(
    ("variables", "message", "remedy"),
    [
        (READER, "AccessDenied", "s3:PutObject"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, "no complete credentials", "AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "nobody"}, "profile (nobody) could not be found", "AWS_*"),
    ],
)
def test_refused_credentials(
    s3_uri: str, s3_server: S3Server, monkeypatch, variables, message: str, remedy: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    for name, value in (s3_server.env(variables) if variables is READER else variables).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    error = denied(open_store(s3_uri))
    assert message in error.message
    assert remedy in error.remedy


def test_missing_bucket(s3_uri: str) -> None:
    error = denied(open_store("s3://no-such-bucket/runs"))
    assert "NoSuchBucket" in error.message
    assert os.environ["AWS_ENDPOINT_URL"] in error.message
    assert "create the bucket" in error.remedy


def test_endpoint_that_refuses_connections(s3_uri: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        error = denied(open_store(s3_uri, endpoint_url=f"http://user:not-the-secret@127.0.0.1:{port}"))
    assert f"http://127.0.0.1:{port}" in error.message
    assert "Connection refused" in error.message
    assert "spec.storage.endpointUrl" in error.remedy


def test_endpoint_that_never_answers(s3_uri: str) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(16)
        error = denied(open_store(s3_uri, endpoint_url=f"http://127.0.0.1:{mute.getsockname()[1]}"), within=60)
    assert "ReadTimeoutError" in error.message


def test_endpoint_with_an_untrusted_certificate(s3_uri: str, tmp_path: Path) -> None:
    context, _ = self_signed(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        server = context.wrap_socket(plain, server_side=True)

        def refuse() -> None:
            with pytest.raises(ssl.SSLError):
                server.accept()

        thread = threading.Thread(target=refuse)
        thread.start()
        error = denied(open_store(s3_uri, endpoint_url=f"https://localhost:{server.getsockname()[1]}"))
        thread.join(10)
        server.close()
    assert "certificate is not trusted" in error.message
    assert "spec.storage.caBundle" in error.remedy


def test_malformed_endpoint(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(TrainerError, match="not a url") as raised:
        open_store(s3_uri).get_bytes("x")
    assert raised.value.failure_class is FailureClass.CONFIG_INVALID
    assert "AWS_ENDPOINT_URL" in raised.value.remedy


def test_outage_longer_than_the_window_is_worth_a_new_attempt(s3_uri: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(TrainerError, match="Connection refused") as raised:
            open_store(s3_uri, endpoint_url=endpoint, retry_seconds=0.5).get_bytes("x")
    assert raised.value.failure_class is FailureClass.UNKNOWN


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for uri in ((tmp_path / "file").as_uri(), (tmp_path / "file" / "below").as_uri()):
        error = denied(open_store(uri))
        assert os.strerror(errno.ENOTDIR) in error.message
        assert "spec.storage.uri" in error.remedy


def test_silence_is_a_wrong_address_at_first_and_an_outage_later(s3_uri: str, s3_server: S3Server) -> None:
    """An attempt that follows another one is tried again after an outage; StorageDenied would be the run's end."""
    with faulty(s3_server.endpoint) as proxy:
        store = open_store(s3_uri, endpoint_url=proxy.endpoint, retry_seconds=10.0)
        check_writable(store)
        proxy.down_until = math.inf
        assert "endpoint is up" in denied(store).remedy
        outlasting = threading.Thread(target=check_writable, args=(store,), kwargs={"worked_before": True})
        outlasting.start()
        outlasting.join(1.0)
        assert outlasting.is_alive(), "it did not wait for storage to come back"
        proxy.down_until = 0.0
        outlasting.join(30.0)
        assert not outlasting.is_alive()
        proxy.down_until = math.inf
        with pytest.raises(TrainerError) as raised:
            check_writable(open_store(s3_uri, endpoint_url=proxy.endpoint, retry_seconds=1.0), worked_before=True)
        assert raised.value.failure_class is FailureClass.UNKNOWN


CHECK = """
import sys
from dsft_trainer.checkpoint.store import check_writable, open_store
from dsft_trainer.errors import TrainerError
store = open_store(sys.argv[1])
try:
    check_writable(store)
    store.put_bytes("large", bytes(4 << 20))
except TrainerError as error:
    sys.exit(f"{error.failure_class} {error.message} ({error.remedy}) {[entry.key for entry in store.list()]}")
"""


@pytest.mark.parametrize(
    ("option", "message", "remedy"),
    [
        ("size=1m", "No space left on device", "free space"),
        ("ro", "Read-only file system", "mount the volume read-write"),
    ],
)
def test_full_and_read_only_volumes(tmp_path: Path, option: str, message: str, remedy: str) -> None:
    """On a real file system of its own, in a namespace of its own."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mount, "mount -t tmpfs none /mnt"], check=False, capture_output=True).returncode:
        pytest.skip("may not mount in a user namespace")
    script = 'mount -t tmpfs -o "$0" none "$1" && exec "$2" -c "$3" "file://$1"'
    done = subprocess.run(
        [*mount, script, option, str(tmp_path), sys.executable, CHECK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("StorageDenied "), done.stderr
    assert tmp_path.as_uri() in done.stderr
    assert message in done.stderr
    assert remedy in done.stderr
    assert done.stderr.rstrip().endswith("[]"), "nothing half-written is listed"


def test_an_identity_of_one_prefix_gets_at_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/security.md advises: then the object store holds what a policy of the operator only says."""
    actions = tuple(f"{verb}:runs/team-a/*" for verb in ("Read", "Write", "List"))
    team = Identity("team-a", "dsft-team-a", "dsft-team-a-secret", actions)
    server = S3Server.start(tmp_path / "s3", identities=(ADMIN, team))
    try:
        bucket = server.make_bucket("runs")
        for name, value in server.env(team).items():
            monkeypatch.setenv(name, value)
        check_writable(open_store(f"{bucket}/team-a/run"))
        for place in ("team-b/run", "team-ab/run", "run"):
            denied(open_store(f"{bucket}/{place}"))
    finally:
        server.stop()
