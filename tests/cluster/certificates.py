"""The cluster's own certificate authority: who a client is, is said by its certificate (CN: user, O: groups).

Keys are P-256: made in a millisecond, and good for ServiceAccount tokens too.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = timedelta(days=365)
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class KeyPair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a folder: `ca.crt`, `ca.key`, and what it issued."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Authority":
        """Make a new one."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder)
        key = new_key(folder / "ca.key")
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-cluster-ca")])
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(name, name, key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        authority.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        return authority

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self.folder / "ca.crt"

    def issue(self, file_name: str, user: str, groups: Sequence[str] = (), hosts: Iterable[str] = ()) -> KeyPair:
        """Issue a certificate for a client, and for a server where `hosts` (names and addresses) are given."""
        issuer = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        issuer_key = load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
        pair = KeyPair(self.folder / f"{file_name}.crt", self.folder / f"{file_name}.key")
        key = new_key(pair.key)
        subject = x509.Name(
            [
                *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups),
                x509.NameAttribute(NameOID.COMMON_NAME, user),
            ]
        )
        names = [_general_name(host) for host in hosts]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if names else [])]
        builder = _builder(subject, issuer.subject, key).add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        pair.certificate.write_bytes(builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return pair


def self_signed(folder: Path, hosts: Iterable[str]) -> KeyPair:
    """A server's certificate that is its own authority, in a folder: `tls.crt`, `tls.key`. RSA, for who reads no other key."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = KeyPair(folder / "tls.crt", folder / "tls.key")
    key = rsa.generate_private_key(65537, 2048)
    _write_key(pair.key, key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test-server")])
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    return pair


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make a private key, readable by its owner only."""
    key = ec.generate_private_key(ec.SECP256R1())
    _write_key(path, key)
    return key


def _write_key(path: Path, key: _Key) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))


def _builder(subject: x509.Name, issuer: x509.Name, key: _Key) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of nodes may differ.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
