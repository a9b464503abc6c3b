"""TLS for DIMSE, against DCMTK's tools and openssl; who may come with which AE title."""

from __future__ import annotations

import contextlib
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
from dicom_node.tls import Reloading, client_context, fingerprint, server_context
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


def associate(port: int, pki, name: str | None, *, calling: str = "SCANNER", user: tuple[int, str, str] | None = None):
    """Ask for an association, by TLS unless the port is in PLAIN; `user` is a type of PS3.7 D.3.3.7 and two fields."""
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if name:
        context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
    entity = AE(ae_title=calling)
    entity.acse_timeout = entity.connection_timeout = 5
    entity.add_requested_context(VERIFICATION)
    items = []
    if user:
        item = UserIdentityNegotiation()
        item.user_identity_type, item.primary_field = user[0], user[1].encode()
        if user[0] == 2:
            item.secondary_field = user[2].encode()
        items.append(item)
    options = {} if port in PLAIN else {"tls_args": (context, "localhost")}
    return entity.associate(HERE, port, ext_neg=items, **options)


def knock(port: int, pki, name: str | None, **options):
    """Ask for an association; return "accepted" or the rejection's numbers."""
    association = associate(port, pki, name, **options)
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
@pytest.mark.parametrize(
    "name", ["intruder", "alone", "expired", "future"], ids=["stranger's", "self-signed", "expired", "not yet valid"]
)
def test_a_certificate_that_is_not_good_is_refused(secure, pki, dcmtk, eventually, name):
    node = secure()

    done = dcmtk(
        "echoscu", "+tls", pki / f"{name}.key", pki / f"{name}.pem", "+cf", pki / "ca.pem", HERE, node.tls_port
    )

    assert done.returncode != 0
    assert eventually(lambda: node.events("tls.refused"))[0]["fields"]["reason"] == "CERTIFICATE_VERIFY_FAILED"
    assert not node.events("association.rejected")


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


def s_client(tool, pki, port: int, *arguments: str, send: str = "", seconds: float = 2.0) -> str:
    """What `openssl s_client` says with the scanner's certificate; `send` is typed once it is connected."""
    command = [tool("openssl"), "s_client", "-connect", f"{HERE}:{port}", "-CAfile", pki / "ca.pem", *arguments]
    command += ["-cert", pki / "scanner.pem", "-key", pki / "scanner.key"]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    time.sleep(seconds)
    try:
        return process.communicate(send, timeout=20)[0]
    finally:
        process.kill()


def test_nobody_renegotiates_and_nothing_is_compressed(secure, pki, tool):
    node = secure()

    said = s_client(tool, pki, node.tls_port, "-tls1_2", "-msg", send="R\n")

    assert "RENEGOTIATING" in said
    assert "no_renegotiation" in said.lower().replace(" ", "_")
    assert "Compression: NONE" in said
    assert knock(node.tls_port, pki, "scanner") == "accepted"


def test_the_least_version_can_be_1_3(secure, pki, tool):
    node = secure(tls='minimum_version = "1.3"')

    assert "Cipher is (NONE)" in s_client(tool, pki, node.tls_port, "-tls1_2", seconds=0.5)
    assert "Cipher is TLS_" in s_client(tool, pki, node.tls_port, seconds=0.5)


@pytest.mark.peer("echoscu")
def test_tls_at_the_plain_port_and_plain_at_the_tls_port_are_let_go(secure, pki, dcmtk, tool, eventually):
    node = secure()

    wrong = dcmtk("echoscu", "-to", "5", "-ta", "5", HERE, node.tls_port)
    assert wrong.returncode != 0
    assert eventually(lambda: node.events("tls.refused"))
    assert "Cipher is (NONE)" in s_client(tool, pki, node.port, seconds=0.5)

    assert dcmtk("echoscu", HERE, node.port).returncode == 0
    right = dcmtk(
        "echoscu", "+tls", pki / "scanner.key", pki / "scanner.pem", "+cf", pki / "ca.pem", HERE, node.tls_port
    )
    assert right.returncode == 0, right.stderr


def test_certificate_and_authority_change_without_a_restart_and_open_associations_stay(receiver, pki, tmp_path):
    files = {"node.pem": "node.pem", "node.key": "node.key", "ca.pem": "ca.pem"}

    def install(**sources: str) -> None:
        for name, source in (files | sources).items():
            (tmp_path / name).write_bytes((pki / source).read_bytes())

    install()
    node = receiver(settings(tmp_path))
    port = node.scp.ports[-1]
    early = associate(port, pki, "scanner")
    assert early.is_established

    install(**{"node.pem": "node2.pem", "node.key": "node2.key", "ca.pem": "stranger.pem"})
    node.scp.reap()

    assert early.send_c_echo().Status == 0x0000
    assert shown_by(port, pki, "intruder") == digest_of(pki / "node2.pem")
    assert knock(port, pki, "intruder") == "accepted"
    assert knock(port, pki, "scanner") == "no association"
    early.release()


def shown_by(port: int, pki, name: str) -> str | None:
    """The digest of the certificate that the node shows to whoever has the certificate `name`."""
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
    with socket.create_connection((HERE, port)) as plain, context.wrap_socket(plain, server_hostname="localhost") as it:
        return fingerprint(it.getpeercert(binary_form=True))


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

    def answer(*user: object, calling: str = "CT1"):
        return knock(node.port, pki, None, calling=calling, user=user or None)

    refused = A_ASSOCIATE_RJ[Rejection.USER]
    assert answer(2, "ct1", "open sesame") == "accepted"
    assert answer(2, "ct1", "guess") == refused
    assert answer(2, "ct2", "open sesame") == refused
    assert answer(1, "ct1", "") == refused, "a name without the passcode"
    assert answer() == refused
    assert answer(2, "any", "thing", calling="CT2") == "accepted"
    assert {event["fields"]["reason"] for event in node.events("association.rejected")} == {Rejection.USER.value}
    PLAIN.clear()
    assert "open sesame" not in repr(node.settings)


@pytest.mark.parametrize(
    ("kind", "is_admitted"), [(1, True), (3, False), (4, False), (5, False)], ids=["name", "Kerberos", "SAML", "JWT"]
)
def test_a_user_is_named_as_a_user_and_not_by_a_token_that_nobody_can_verify(secure, pki, kind, is_admitted):
    node = secure(peers=f'[peer.CT1]\nae_title = "CT1"\nhost = "{HERE}"\nport = 104\nuser = "ct1"\n')

    answer = knock(node.tls_port, pki, "scanner", calling="CT1", user=(kind, "ct1", ""))

    assert answer == ("accepted" if is_admitted else A_ASSOCIATE_RJ[Rejection.USER])


@pytest.mark.parametrize(
    ("networks", "is_admitted"), [('["127.0.0.0/8"]', True), ('["10.1.0.0/16", "::1/128"]', False)]
)
def test_only_these_networks_may_come(secure, pki, networks, is_admitted):
    node = secure(f"addresses = {networks}")

    answer = knock(node.tls_port, pki, "scanner")

    assert answer == ("accepted" if is_admitted else A_ASSOCIATE_RJ[Rejection.ADDRESS])


# -- out --------------------------------------------------------------------------------------------------


@pytest.fixture
def listening(tool, free_port, tmp_path):
    """Starts DCMTK's storescp with these arguments, or `openssl s_server`; returns its port."""
    started = []

    def start(*arguments: object, program: str = "storescp") -> int:
        port = free_port()
        own = ["-od", tmp_path, port] if program == "storescp" else ["-accept", port]
        command = [tool(program), *arguments, *own]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((HERE, port)):
                return port
            time.sleep(0.05)
        raise AssertionError(f"{program} does not listen: {process.poll()}")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def storescp(listening, pki):
    """DCMTK's storescp behind TLS; it wants a certificate that the authority has signed."""
    port = listening("+tls", pki / "node.key", pki / "node.pem", "+cf", pki / "ca.pem")
    return SimpleNamespace(port=port)


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


@pytest.mark.peer("storescp")
@pytest.mark.parametrize("name", ["expired", "alone", "intruder", "elsewhere"])
def test_a_peer_with_a_certificate_that_is_not_good_gets_nothing(listening, pki, name):
    port = listening("+tls", pki / f"{name}.key", pki / f"{name}.pem", "+cf", pki / "ca.pem")

    with pytest.raises(PeerUnreachable, match="TLS was not agreed on"):
        echo(peer_of(port, pki), ae_title="DICOM_NODE", timing=TIMING)


@pytest.mark.peer("storescp")
def test_a_peer_may_be_known_by_another_name_than_its_host(listening, pki):
    port = listening("+tls", pki / "elsewhere.key", pki / "elsewhere.pem", "+cf", pki / "ca.pem")

    echo(peer_of(port, pki, tls_name="pacs.hospital.example"), ae_title="DICOM_NODE", timing=TIMING)


@pytest.mark.peer("storescp")
def test_a_peer_that_asks_for_no_certificate_still_shows_its_own(listening, pki):
    port = listening("+tls", pki / "node.key", pki / "node.pem", "-ic")

    echo(peer_of(port, pki, tls_certificate=None, tls_key=None), ae_title="DICOM_NODE", timing=TIMING)


@pytest.mark.peer("storescp")
def test_each_peer_has_its_own_least_version(listening, pki):
    port = listening("+tls", pki / "node.key", pki / "node.pem", "+cf", pki / "ca.pem", "+py")
    old = listening(
        *("s_server", "-tls1_2", "-cert", pki / "node.pem", "-key", pki / "node.key", "-quiet"), program="openssl"
    )

    echo(peer_of(port, pki, tls_minimum_version="1.2"), ae_title="DICOM_NODE", timing=TIMING)
    with pytest.raises(PeerUnreachable, match="TLS was not agreed on"):
        echo(peer_of(old, pki, tls_minimum_version="1.3"), ae_title="DICOM_NODE", timing=TIMING)
    assert client_context(peer_of(old, pki, tls_minimum_version="1.3")).minimum_version == ssl.TLSVersion.TLSv1_3


@pytest.mark.peer("storescp")
def test_a_peer_that_does_not_speak_tls_gets_nothing_in_the_clear(listening, pki):
    port = listening()

    with pytest.raises(PeerUnreachable):
        echo(peer_of(port, pki), ae_title="DICOM_NODE", timing=TIMING)


def test_tls_without_an_authority_is_a_mistake_in_the_settings(pki):
    with pytest.raises(SettingsError, match="tls = true needs tls_ca"):
        echo(peer_of(1, pki, tls_ca=None), ae_title="DICOM_NODE", timing=TIMING)
