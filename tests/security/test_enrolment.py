"""Certificates: real signing requests, also hostile ones, and chains that a real verifier accepts."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from isthmus.errors import ConfigError, ConflictError, InputError, PermissionDeniedError
from security.authority import Authority, host_name, issue_server_certificate
from security.enrolment import IssuingCa, check_device_id, make_csr, new_device_key, public_key_of


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def authority(workspace: Path) -> IssuingCa:
    return IssuingCa.load(workspace / "cloud")


def _request(key: Any, names: list[x509.GeneralName], *, ca: bool = False, common_name: str = "x") -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


def _p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _names(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def test_a_device_gets_a_certificate_that_verifies(workspace: Path, authority: IssuingCa, tmp_path: Path) -> None:
    now = _now()
    key = new_device_key(tmp_path / "device.key")
    csr = make_csr(key, "cam-1", ["cam-1.local", "192.0.2.7"])
    chain = authority.sign(csr, "cam-1", now)
    leaf, issuing = x509.load_pem_x509_certificates(chain)
    root = x509.load_pem_x509_certificate((workspace / "trust" / "ca.pem").read_bytes())
    policy = PolicyBuilder().store(Store([root])).time(now + timedelta(days=1))
    policy.build_server_verifier(x509.DNSName("cam-1.local")).verify(leaf, [issuing])
    policy.build_server_verifier(x509.IPAddress(ipaddress.ip_address("192.0.2.7"))).verify(leaf, [issuing])
    policy.build_client_verifier().verify(leaf, [issuing])
    assert _names(leaf) == ["isthmus://device/cam-1", "cam-1.local", "192.0.2.7"]
    assert leaf.not_valid_after_utc == now + timedelta(days=90)
    assert public_key_of(chain) == public_key_of(csr)
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_the_identity_is_the_codes_and_never_the_requests(authority: IssuingCa) -> None:
    chain = authority.sign(_request(_p256(), [], ca=True, common_name="cam-2"), "cam-1", _now())
    leaf = x509.load_pem_x509_certificate(chain)
    assert leaf.subject.rfc4514_string() == "CN=cam-1"
    assert _names(leaf) == ["isthmus://device/cam-1"]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_request_needs_no_name(authority: IssuingCa) -> None:
    leaf = x509.load_pem_x509_certificate(authority.sign(make_csr(_p256(), "", []), "cam-1", _now()))
    assert leaf.subject.rfc4514_string() == "CN=cam-1"


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(ec.generate_private_key(ec.SECP384R1()), id="p384"),
        pytest.param(ed25519.Ed25519PrivateKey.generate(), id="ed25519"),
        pytest.param(rsa.generate_private_key(65537, 2048), id="rsa"),
    ],
)
def test_only_p256_keys_are_accepted(authority: IssuingCa, key: Any) -> None:
    with pytest.raises(InputError, match="P-256"):
        authority.sign(_request(key, []), "cam-1", _now())


def test_a_request_that_its_key_did_not_sign_is_refused(authority: IssuingCa) -> None:
    """The public key of somebody else, wrapped in a request that is otherwise well formed."""
    mine, theirs = _p256(), _p256()
    csr = x509.load_pem_x509_csr(_request(mine, []))
    der = csr.public_bytes(Encoding.DER)
    own, other = (  # points have the same length: one replaces the other
        key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for key in (mine, theirs)
    )
    assert der.count(own) == 1
    swapped = x509.load_der_x509_csr(der.replace(own, other)).public_bytes(Encoding.PEM)
    with pytest.raises(InputError, match="not signed with its own key"):
        authority.sign(swapped, "cam-1", _now())


@pytest.mark.parametrize(
    "names",
    [
        [x509.DNSName("*.example.org")],
        [x509.DNSName("a_b.example.org")],
        [x509.DNSName("-a.example.org")],
        [x509.DNSName("a..example.org")],
        [x509.DNSName("")],
        [x509.DNSName("a" * 64)],
        [x509.DNSName("999.999.999.999")],
        [x509.UniformResourceIdentifier("isthmus://device/cam-2")],
        [x509.RFC822Name("root@example.org")],
        [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")]))],
        [x509.DNSName(f"h{n}.example.org") for n in range(9)],
        [x509.DNSName("same.example.org")] * 9,
    ],
)
def test_hosts_that_no_device_should_have_are_refused(authority: IssuingCa, names: list[x509.GeneralName]) -> None:
    with pytest.raises(InputError):
        authority.sign(_request(_p256(), names), "cam-1", _now())


@pytest.mark.parametrize("host", ["cloud.example.org", "CLOUD.Example.Org"])
def test_a_device_cannot_pose_as_the_cloud(authority: IssuingCa, host: str) -> None:
    with pytest.raises(PermissionDeniedError) as refusal:
        authority.sign(make_csr(_p256(), "cam-1", [host]), "cam-1", _now())
    assert refusal.value.reason == "host-not-allowed"


def test_loopback_is_everybodys(authority: IssuingCa) -> None:
    chain = authority.sign(make_csr(_p256(), "cam-1", ["localhost", "127.0.0.1", "::1"]), "cam-1", _now())
    assert _names(x509.load_pem_x509_certificate(chain))[1:] == ["localhost", "127.0.0.1", "::1"]


@pytest.mark.parametrize("csr", [b"", b"nonsense", b"-----BEGIN CERTIFICATE REQUEST-----\n", b"A" * 16385])
def test_garbage_is_refused(authority: IssuingCa, csr: bytes) -> None:
    with pytest.raises(InputError):
        authority.sign(csr, "cam-1", _now())


@pytest.mark.parametrize("device_id", ["", "a b", "../x", ".hidden", "a" * 65, "a\n", "ä"])
def test_device_ids_that_are_no_names_are_refused(authority: IssuingCa, device_id: str) -> None:
    with pytest.raises(InputError):
        check_device_id(device_id)
    with pytest.raises(InputError):
        authority.sign(make_csr(_p256(), "", []), device_id, _now())


def test_a_certificate_never_outlives_its_authority(workspace: Path, authority: IssuingCa) -> None:
    issuing = x509.load_pem_x509_certificate((workspace / "cloud" / "issuing-ca.pem").read_bytes())
    late = issuing.not_valid_after_utc - timedelta(days=1)
    leaf = x509.load_pem_x509_certificate(authority.sign(make_csr(_p256(), "", []), "cam-1", late))
    assert leaf.not_valid_after_utc == issuing.not_valid_after_utc


def test_the_issuing_authority_cannot_make_authorities(workspace: Path) -> None:
    issuing = x509.load_pem_x509_certificate((workspace / "cloud" / "issuing-ca.pem").read_bytes())
    assert issuing.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    new_device_key(tmp_path / "device.key")
    before = (tmp_path / "device.key").read_bytes()
    with pytest.raises(ConflictError):
        new_device_key(tmp_path / "device.key")
    assert (tmp_path / "device.key").read_bytes() == before
    assert (tmp_path / "device.key").stat().st_mode & 0o777 == 0o600


def test_a_server_certificate_needs_a_host(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        issue_server_certificate(Authority.load(workspace / "operator", "ca"), tmp_path, [], _now())


def test_an_authority_with_another_key_is_refused(own_workspace: Path) -> None:
    cloud = own_workspace / "cloud"
    (cloud / "issuing-ca.key").write_bytes((cloud / "server.key").read_bytes())
    with pytest.raises(ConfigError, match="does not certify"):
        IssuingCa.load(cloud)


def test_public_key_of_something_else_is_refused() -> None:
    with pytest.raises(InputError):
        public_key_of(b"nonsense")


def test_hosts_are_names_or_addresses() -> None:
    assert host_name("Example.ORG") == x509.DNSName("example.org")
    assert host_name("::1") == x509.IPAddress(ipaddress.ip_address("::1"))
    with pytest.raises(InputError):
        host_name("https://example.org")
