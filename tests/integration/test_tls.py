"""TLS for DIMSE, against DCMTK's tools and openssl; who may come with which AE title."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from types import SimpleNamespace

import pytest
from pynetdicom import AE
from pynetdicom.pdu_primitives import UserIdentityNegotiation

from dicom_node.config import DeliveryTable, Peer, TlsTable
from dicom_node.delivery.cstore import echo
from dicom_node.errors import PeerUnreachable, SettingsError
from dicom_node.services import A_ASSOCIATE_RJ, Rejection
from dicom_node.tls import Reloading, fingerprint, server_context
from tests.datasets import ct, write

pytestmark = pytest.mark.peer("openssl")
HERE = "127.0.0.1"
VERIFICATION = "1.2.840.10008.1.1"
TIMING = DeliveryTable(connect_timeout=3.0, response_timeout=3.0)


def settings(pki, extra: str = "", tls: str = "") -> str:
    return f"""[receive]
minimum_free_megabytes = 1
association_timeout = 3
{extra}
[tls]
port = 0
certificate = "{pki}/node.pem"
key = "{pki}/node.key"
ca = "{pki}/ca.pem"
{tls}
"""


@pytest.fixture
def secure(receiver, pki):
    def make(extra: str = "", tls: str = "", peers: str = ""):
        node = receiver(settings(pki, extra, tls) + peers)
        node.tls_port = node.scp.ports[-1]
        return node

    return make


def digest_of(path) -> str:
    return fingerprint(ssl.PEM_cert_to_DER_cert(path.read_text()))


def knock(port: int, pki, name: str | None, *, calling: str = "SCANNER", user: tuple[str, str] | None = None):
    """Ask for an association; return "accepted" or the rejection's numbers, or raise what TLS raises."""
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if name:
        context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.connection_timeout = 5
    entity.add_requested_context(VERIFICATION)
    items = []
    if user:
        item = UserIdentityNegotiation()
        item.user_identity_type, item.primary_field, item.secondary_field = 2, user[0].encode(), user[1].encode()
        items.append(item)
    options = {} if port in PLAIN else {"tls_args": (context, "localhost")}
    association = entity.associate(HERE, port, ext_neg=items, **options)
    if association.is_established:
        association.release()
        return "accepted"
    if association.is_rejected:
        answer = association.acceptor.primitive
        return answer.result, answer.result_source, answer.diagnostic
    return "no association"


PLAIN: set[int] = set()


# -- in ---------------------------------------------------------------------------------------------------


@pytest.mark.peer("storescu")
def test_dcmtk_stores_over_tls_with_a_certificate(secure, pki, dcmtk, tmp_path):
    node = secure()
    path = write(ct(1), tmp_path / "1.dcm")

    done = dcmtk(
        "storescu", "+tls", pki / "scanner.key", pki / "scanner.pem", "+cf", pki / "ca.pem", HERE, node.tls_port, path
    )

    assert done.returncode == 0, done.stderr
    assert len(node.files()) == 1


@pytest.mark.peer("echoscu")
def test_dcmtk_without_a_certificate_is_refused(secure, pki, dcmtk, eventually):
    node = secure()

    done = dcmtk("echoscu", "+tla", "+cf", pki / "ca.pem", HERE, node.tls_port)

    assert done.returncode != 0
    assert eventually(lambda: node.events("tls.refused"))[0]["fields"]["reason"] == "PEER_DID_NOT_RETURN_A_CERTIFICATE"


@pytest.mark.peer("echoscu")
def test_dcmtk_without_a_certificate_is_welcome_where_none_is_required(secure, pki, dcmtk):
    node = secure(tls='client_certificates = "none"')

    done = dcmtk("echoscu", "+tla", "+cf", pki / "ca.pem", HERE, node.tls_port)

    assert done.returncode == 0, done.stderr


@pytest.mark.peer("echoscu")
def test_a_certificate_that_a_stranger_has_signed_is_refused(secure, pki, dcmtk, eventually):
    node = secure()

    done = dcmtk(
        "echoscu", "+tls", pki / "intruder.key", pki / "intruder.pem", "+cf", pki / "ca.pem", HERE, node.tls_port
    )

    assert done.returncode != 0
    assert eventually(lambda: node.events("tls.refused"))[0]["fields"]["reason"] == "CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize(
    ("arguments", "is_agreed"),
    [
        (["-tls1_3"], True),
        (["-tls1_2"], True),
        (["-tls1_2", "-cipher", "ECDHE-RSA-AES256-GCM-SHA384"], True),
        (["-tls1_2", "-cipher", "AES128-GCM-SHA256"], False),  # no forward secrecy
        (["-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA256"], False),  # no AEAD
        (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], False),
        (["-tls1", "-cipher", "ALL:@SECLEVEL=0"], False),
    ],
)
def test_the_profile_is_bcp_195(secure, pki, tool, arguments, is_agreed):
    node = secure()
    command = [
        tool("openssl"),
        "s_client",
        "-connect",
        f"{HERE}:{node.tls_port}",
        "-CAfile",
        pki / "ca.pem",
        *arguments,
    ]
    command += ["-cert", pki / "scanner.pem", "-key", pki / "scanner.key", "-verify_return_error"]

    done = subprocess.run(list(map(str, command)), input="", capture_output=True, text=True, timeout=20)

    assert ("Cipher is (NONE)" not in done.stdout and "Verify return code: 0" in done.stdout) == is_agreed, done.stdout


def test_who_never_finishes_the_handshake_holds_up_nobody_and_is_let_go(secure, pki):
    node = secure()
    silent = [socket.create_connection((HERE, node.tls_port)) for _ in range(20)]
    garbage = socket.create_connection((HERE, node.tls_port))
    garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")

    started = time.monotonic()
    assert knock(node.tls_port, pki, "scanner") == "accepted"
    assert time.monotonic() - started < 2.0

    for connection in (*silent, garbage):
        connection.settimeout(8.0)
        try:
            while connection.recv(100):
                pass
        except ConnectionError:
            pass
        connection.close()


def test_a_new_certificate_is_used_without_a_restart_and_a_broken_one_is_not(pki, tmp_path):
    files = {name: tmp_path / name for name in ("certificate", "key", "ca")}
    for name, source in (("certificate", "node.pem"), ("key", "node.key"), ("ca", "ca.pem")):
        files[name].write_bytes((pki / source).read_bytes())
    reloading = Reloading(TlsTable(**files))
    first = reloading.context
    assert not reloading.reload()

    files["certificate"].write_text("not a certificate")
    assert not reloading.reload()
    assert reloading.context is first

    files["certificate"].write_bytes((pki / "node2.pem").read_bytes())
    files["key"].write_bytes((pki / "node2.key").read_bytes())
    assert reloading.reload()
    assert reloading.context is not first


def test_without_a_plain_port_nobody_comes_in_the_clear(secure, pki):
    node = secure("plain = false")

    assert len(node.scp.ports) == 1
    assert knock(node.tls_port, pki, "scanner") == "accepted"
    PLAIN.add(node.tls_port)
    assert knock(node.tls_port, pki, None) == "no association"
    PLAIN.clear()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"certificate": "node.pem", "key": "scanner.key", "ca": "ca.pem"}, "the key is another certificate's"),
        ({"certificate": "other.pem", "key": "scanner.key", "ca": "ca.pem"}, "the key is another certificate's"),
        ({"certificate": "missing.pem", "key": "node.key", "ca": "ca.pem"}, "tls.certificate .*No such file"),
        ({"certificate": "node.pem", "ca": "ca.pem"}, "tls.certificate and tls.key: both"),
        ({"certificate": "node.pem", "key": "node.key"}, "tls.ca: needed to verify clients"),
        ({"certificate": "node.pem", "key": "node.key", "ca": "node.key"}, "tls.ca .*no certificate in PEM"),
    ],
)
def test_what_is_wrong_with_the_files_is_said_by_key_and_file(pki, table, words):
    with pytest.raises(SettingsError, match=words):
        server_context(TlsTable(**{name: pki / file for name, file in table.items()}))


# -- who may bear which AE title --------------------------------------------------------------------------


def test_an_ae_title_belongs_to_a_certificate(secure, pki):
    node = secure(
        peers=f"""[peer.CT1]
ae_title = "CT1"
host = "{HERE}"
port = 104
certificate_sha256 = ["{digest_of(pki / "scanner.pem").upper()}"]
"""
    )
    PLAIN.add(node.port)

    assert knock(node.tls_port, pki, "scanner", calling="CT1") == "accepted"
    assert knock(node.tls_port, pki, "other", calling="CT1") == A_ASSOCIATE_RJ[Rejection.CERTIFICATE]
    assert knock(node.port, pki, None, calling="CT1") == A_ASSOCIATE_RJ[Rejection.CERTIFICATE]
    assert knock(node.tls_port, pki, "other", calling="CT2") == "accepted"
    PLAIN.clear()
    assert len(node.events("association.rejected")) == 2


def test_an_ae_title_belongs_to_a_user(secure, pki, monkeypatch):
    monkeypatch.setenv("SCANNER_PASSCODE", "open sesame")
    node = secure(
        peers=f"""[peer.CT1]
ae_title = "CT1"
host = "{HERE}"
port = 104
user = "ct1"
passcode = "${{env:SCANNER_PASSCODE}}"
"""
    )
    PLAIN.add(node.port)

    assert knock(node.port, pki, None, calling="CT1", user=("ct1", "open sesame")) == "accepted"
    assert knock(node.port, pki, None, calling="CT1", user=("ct1", "guess")) == A_ASSOCIATE_RJ[Rejection.USER]
    assert knock(node.port, pki, None, calling="CT1", user=("ct2", "open sesame")) == A_ASSOCIATE_RJ[Rejection.USER]
    assert knock(node.port, pki, None, calling="CT1") == A_ASSOCIATE_RJ[Rejection.USER]
    assert knock(node.port, pki, None, calling="CT2", user=("any", "thing")) == "accepted"
    PLAIN.clear()
    assert "open sesame" not in repr(node.settings)


@pytest.mark.parametrize(
    ("networks", "is_admitted"), [('["127.0.0.0/8"]', True), ('["10.1.0.0/16", "::1/128"]', False)]
)
def test_only_these_networks_may_come(secure, pki, networks, is_admitted):
    node = secure(f"addresses = {networks}")

    answer = knock(node.tls_port, pki, "scanner")

    assert answer == ("accepted" if is_admitted else A_ASSOCIATE_RJ[Rejection.ADDRESS])


# -- out --------------------------------------------------------------------------------------------------


@pytest.fixture
def storescp(pki, tool, free_port, tmp_path):
    """DCMTK's storescp behind TLS; it wants a certificate that the authority has signed."""
    port = free_port()
    command = [
        tool("storescp"),
        "+tls",
        pki / "node.key",
        pki / "node.pem",
        "+cf",
        pki / "ca.pem",
        "-od",
        tmp_path,
        port,
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    yield SimpleNamespace(port=port)
    process.terminate()
    process.wait()


def peer_of(port: int, pki, **options) -> Peer:
    own = {"tls_certificate": pki / "scanner.pem", "tls_key": pki / "scanner.key", "tls_ca": pki / "ca.pem"}
    return Peer(ae_title="ANY-SCP", host=HERE, port=port, tls=True, **(own | options))


@pytest.mark.peer("storescp")
def test_the_node_speaks_tls_to_a_peer_and_shows_its_certificate(storescp, pki):
    echo(peer_of(storescp.port, pki), ae_title="DICOM_NODE", timing=TIMING)


@pytest.mark.peer("storescp")
@pytest.mark.parametrize(
    "options",
    [
        {"tls_ca": "stranger.pem"},  # the peer's certificate is from somebody else
        {"tls_name": "pacs.hospital.example"},  # the peer is somebody else
        {"tls_certificate": "intruder.pem", "tls_key": "intruder.key"},  # the peer does not know us
    ],
)
def test_a_peer_that_is_not_who_it_should_be_gets_nothing(storescp, pki, options):
    options = {name: pki / value if value.endswith(("pem", "key")) else value for name, value in options.items()}

    with pytest.raises(PeerUnreachable, match="TLS was not agreed on"):
        echo(peer_of(storescp.port, pki, **options), ae_title="DICOM_NODE", timing=TIMING)


def test_tls_without_an_authority_is_a_mistake_in_the_settings(pki):
    with pytest.raises(SettingsError, match="tls = true needs tls_ca"):
        echo(peer_of(1, pki, tls_ca=None), ae_title="DICOM_NODE", timing=TIMING)
