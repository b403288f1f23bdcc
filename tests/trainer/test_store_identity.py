"""Keys that a ServiceAccount is given for an hour: a store asks for new ones by itself, with the token of then.

S3 is real. Who gives the keys is a double: it speaks as AWS's STS does to IRSA (AssumeRoleWithWebIdentity), and as the agent
of EKS Pod Identity does, but for the session token, which SeaweedFS would look for among its own. The keys it gave first are
taken from the server, so that only new ones can work.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from dsft_trainer.checkpoint.store import open_store
from tests.http_double import HttpDouble, QuietHandler
from tests.s3_server import ADMIN, Identity, S3Server

# Not the server's admin, whom it must always know.
FIRST = Identity("first", "dsft-first", "dsft-first-secret", ADMIN.actions)
SECOND = Identity("second", "dsft-second", "dsft-second-secret", ADMIN.actions)
_STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken/>
<Expiration>{expiration}</Expiration></Credentials><AssumedRoleUser><Arn>a</Arn><AssumedRoleId>i</AssumedRoleId></AssumedRoleUser>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class Giver(HttpDouble):
    """Gives the keys of an identity, for less time than botocore leaves to the last moment, and keeps the tokens it was shown."""

    def __init__(self) -> None:
        super().__init__(self._handler())
        self.gives = FIRST
        self.shown: list[str] = []

    def _handler(self) -> type[QuietHandler]:
        giver = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:
                form = parse_qs(self.body().decode())
                assert form["Action"] == ["AssumeRoleWithWebIdentity"]
                self._answer(form["WebIdentityToken"][0], _STS.format(**giver.keys()))

            def do_GET(self) -> None:
                keys = giver.keys()
                told = {"AccessKeyId": keys["key"], "SecretAccessKey": keys["secret"], "Token": ""}
                self._answer(self.headers["Authorization"], json.dumps({**told, "Expiration": keys["expiration"]}))

            def _answer(self, token: str, text: str) -> None:
                giver.shown.append(token)
                self.reply(200, text.encode())

        return Handler

    def keys(self) -> dict[str, Any]:
        end = datetime.now(UTC) + timedelta(minutes=5)
        return {
            "key": self.gives.access_key,
            "secret": self.gives.secret_key,
            "expiration": f"{end:%Y-%m-%dT%H:%M:%SZ}",
        }


@pytest.fixture
def giver() -> Iterator[Giver]:
    with Giver() as it:
        yield it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    it = S3Server.start(tmp_path / "s3", identities=(ADMIN, FIRST))
    yield it
    it.stop()


WAYS = {
    "IRSA": {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/trainer",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "{token}",
        "AWS_ENDPOINT_URL_STS": "{endpoint}",
    },
    "EKS Pod Identity": {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "{endpoint}/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "{token}",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_keys_are_renewed_while_a_run_lasts(
    way: str, giver: Giver, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("token-one")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in WAYS[way].items():
        monkeypatch.setenv(name, value.format(token=token, endpoint=giver.uri))
    store = open_store(f"{server.make_bucket('runs')}/a", endpoint_url=server.endpoint, region="us-east-1")
    store.put_bytes("x", b"1")
    # An hour later: the kubelet has renewed the token, and the keys of then are no longer taken.
    token.write_text("token-two")
    giver.gives = SECOND
    server.restart(identities=(ADMIN, SECOND))
    store.put_bytes("x", b"2")
    assert store.get_bytes("x") == b"2"
    assert giver.shown[0] == "token-one"
    assert giver.shown[-1] == "token-two"
