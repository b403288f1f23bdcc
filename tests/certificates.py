"""A certificate for localhost that nobody trusts who is not told to."""

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

_REQUEST = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"


def self_signed(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """What a server needs to have it, and its file. Skips the test where there is no openssl."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl for a certificate")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run([*_REQUEST.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate
