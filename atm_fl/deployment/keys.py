"""Certificates and keys: a private authority, the SuperLink's certificate, one key pair a party.

Elliptic curve P-384 throughout, which is what SuperNode authentication asks for. A secret file is created with mode
0600, so that it is at no time readable by others.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 825
SECRET_MODE = 0o600


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read; FileExistsError rather than overwrite one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_MODE), "wb") as file:
        os.fchmod(file.fileno(), SECRET_MODE)  # whatever the umask
        file.write(content)


def make_authority(certificate: Path, key: Path) -> None:
    """Write a new certificate authority, for this federation alone."""
    secret = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "atm-fl federation")])
    made = (
        _begin(name, name, secret.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), critical=False)
        .sign(secret, hashes.SHA384())
    )
    write_secret(key, _pem(secret))
    certificate.write_bytes(made.public_bytes(Encoding.PEM))


def make_certificate(
    certificate: Path,
    key: Path,
    authority: Path,
    authority_key: Path,
    hosts: Iterable[str],
    days: int = CERTIFICATE_DAYS,
) -> None:
    """Write the SuperLink's certificate for `hosts`, names or IP addresses, and its key, in place of older ones."""
    issuer = x509.load_pem_x509_certificate(authority.read_bytes())
    signer = load_pem_private_key(authority_key.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    secret = ec.generate_private_key(ec.SECP384R1())
    made = (
        _begin(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")]), issuer.subject, secret.public_key(), days
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    key.unlink(missing_ok=True)
    write_secret(key, _pem(secret))
    certificate.write_bytes(made.public_bytes(Encoding.PEM))


def certified_hosts(certificate: Path) -> list[str]:
    """The names and addresses that a certificate is for."""
    names = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return [str(name.value) for name in names.value]


def make_key_pair(key: Path, public: Path, comment: str) -> None:
    """Write a party's key pair as OpenSSH files; the secret half must not exist yet."""
    secret = ec.generate_private_key(ec.SECP384R1())
    write_secret(key, secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = secret.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    public.write_bytes(line + f" {comment}\n".encode())


def make_signing_key(key: Path, public: Path) -> None:
    """Write the Ed25519 key pair by which apps are signed, as OpenSSH files; neither may exist yet."""
    secret = ed25519.Ed25519PrivateKey.generate()
    write_secret(key, secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(secret.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" apps\n")


def key_id(public: str) -> str:
    """The fingerprint of a public key in OpenSSH's form, "ssh-ed25519 AAAA…", as `ssh-keygen -l` tells it."""
    digest = hashlib.sha256(b64decode(public.split()[1])).digest()
    return f"SHA256:{b64encode(digest).decode().rstrip('=')}"


def _begin(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # the other hosts' clocks may be behind
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # type: ignore[assignment]
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
