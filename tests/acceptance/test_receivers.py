"""Several processes of one node receive on one port: what one process keeps to itself holds for all together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import ssl
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from pynetdicom import AE

from dicom_node.commitment import Reference
from tests.acceptance.stand import NodeProcess, free_port, wait_for
from tests.datasets import CT, EXPLICIT, as_file, ct
from tests.integration.test_commitment import HERE, Modality

ALONE = 'broker = "redis://127.0.0.1:1/0"'  # no workers: nothing is run here
RECEIVER = "-m dicom_node.receiver"


@pytest.fixture
def several(node):
    """Starts a node with three processes that receive."""

    def start(*, processes: int = 3, receive: str = "", peer: str = "", **settings) -> NodeProcess:
        receive = f"processes = {processes}\n{receive}"
        started = node(pacs_port=free_port(), node=ALONE, receive=receive, peer=peer, **settings).start()
        wait_for("all to listen", lambda: len(listeners(started)) == processes, seconds=40)
        return started

    return start


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A node with three processes that receive, its web, and a modality that it knows."""
    modality, web = Modality(), free_port()
    peer = f'[peer.CT1]\nae_title = "MODALITY"\nhost = "{HERE}"\nport = {modality.port}\n'
    peer += f'[commitment]\nsame_association_after = 0.2\n[web]\nport = {web}\ntoken = "t"'
    folder = tmp_path_factory.mktemp("shared") / "node"
    node = NodeProcess(folder, pacs_port=free_port(), node=ALONE, receive="processes = 3", peer=peer)
    try:
        node.start()
        wait_for("all to listen", lambda: len(listeners(node)) == 3, seconds=40)
        yield node, web, modality
    finally:
        node.end()
        modality.server.shutdown()


def listeners(node: NodeProcess) -> set[int]:
    """Return the processes that listen on a node's port."""
    inodes = {inode for local, _, state, inode in connections() if local == node.port and state == "0A"}
    return {pid for pid in [node.process.pid, *node.children_pids(RECEIVER)] if inodes & sockets_of(pid)}


def holder(node: NodeProcess, association, port: int | None = None) -> int:
    """Return the process that has an association with the node's port, or another of its."""
    theirs = association.dul.socket.socket.getsockname()[1]
    inodes = {inode for local, remote, _, inode in connections() if (local, remote) == (port or node.port, theirs)}
    return next(pid for pid in [node.process.pid, *node.children_pids(RECEIVER)] if inodes & sockets_of(pid))


def connections():
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        yield *(int(fields[at].rpartition(":")[2], 16) for at in (1, 2)), fields[3], fields[9]


def sockets_of(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.update(re.findall(r"socket:\[(\d+)\]", str(entry.readlink())))
    return found


def associate(node: NodeProcess, title: str = "SCANNER"):
    entity = AE(ae_title=title)
    entity.add_requested_context(CT, EXPLICIT)
    return entity.associate(HERE, node.port)


def one_with_each(node: NodeProcess, number: int):
    """Return an association with each of so many processes, by process."""
    found: dict[int, object] = {}

    def another() -> bool:
        association = associate(node)
        pid = holder(node, association)
        if pid in found:
            association.release()
        else:
            found[pid] = association
        return len(found) == number

    wait_for("an association with each process", another, every=0.0)
    return found


def stored(node: NodeProcess) -> dict[str, str]:
    """Return what is on record: the path of each instance."""
    ledger = node.ledger
    try:
        return {
            each.sop_instance_uid: each.path
            for row in ledger.history.recent_series(limit=1000)
            for each in ledger.arrivals.instances_of(row["series_instance_uid"])
        }
    finally:
        ledger.close()


def test_every_process_takes_some_and_the_node_knows_of_all(shared):
    node, web, _ = shared

    def metric(name: str) -> float:
        request = urllib.request.Request(f"http://{HERE}:{web}/metrics", headers={"Authorization": "Bearer t"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return float(re.search(rf"^{re.escape(name)} (\S+)$", answer.read().decode(), re.M)[1])

    stored_metric = 'dicom_node_instances_total{outcome="stored"}'
    before = metric(stored_metric)
    each = one_with_each(node, 3)
    wait_for("all others to have ended", lambda: metric("dicom_node_associations_open") == 3)
    sent = set()
    for series, association in enumerate(each.values()):
        for number in range(1, 6):
            dataset = ct(number, study="all", series=f"series {series}")
            assert association.send_c_store(as_file(dataset)).Status == 0x0000
            sent.add(str(dataset.SOPInstanceUID))
    for association in each.values():
        association.release()

    wait_for("all to be on record", lambda: sent <= stored(node).keys())
    wait_for("all to be counted", lambda: metric(stored_metric) - before == 15)
    wait_for("nobody to be there", lambda: metric("dicom_node_associations_open") == 0)
    assert metric("dicom_node_arrived_files") == 0
    assert node.cli("verify").returncode == 0


def test_no_more_associations_than_there_may_be_in_all_and_of_one_peer(several):
    node = several(receive="maximum_associations = 6\nmaximum_associations_per_peer = 4")
    opened = [associate(node, "ONE") for _ in range(12)]
    mine = [each for each in opened if each.is_established]
    assert len(mine) == 4
    assert len({holder(node, each) for each in mine}) > 1, "else it was one process that counted"
    others = [associate(node, "TWO") for _ in range(6)]
    assert [each.is_established for each in others].count(True) == 2
    mine[0].release()
    wait_for("its place to be free", lambda: associate(node, "TWO").is_established, seconds=10)
    assert not associate(node, "TWO").is_established


def test_what_a_killed_process_has_acknowledged_is_kept_and_the_others_go_on(several):
    node = several(receive="maximum_associations = 3")
    each = one_with_each(node, 3)
    acknowledged: set[str] = set()
    lock = threading.Lock()

    def send(pid: int, association) -> None:
        for number in range(1, 2000):
            dataset = ct(number, series=f"series of {pid}")
            try:
                status = association.send_c_store(as_file(dataset)).get("Status")
            except (RuntimeError, ValueError):
                return
            if status is None:
                return
            assert status == 0x0000
            with lock:
                acknowledged.add(str(dataset.SOPInstanceUID))
            if stop.is_set() and pid != victim:
                return

    victim, stop = node.children_pids(RECEIVER)[0], threading.Event()
    senders = [threading.Thread(target=send, args=item) for item in each.items()]
    for sender in senders:
        sender.start()
    time.sleep(1.0)
    os.kill(victim, signal.SIGKILL)
    wait_for("the process to be there again", lambda: len(listeners(node)) == 3, seconds=40)
    stop.set()
    for sender in senders:
        sender.join(60)
    survivors = [association for pid, association in each.items() if pid != victim]
    assert all(association.is_established for association in survivors), "they have noticed nothing"
    assert associate(node).is_established, "its place is free"
    for association in survivors:
        association.release()

    assert len(acknowledged) > 30
    wait_for("all to be on record", lambda: acknowledged <= stored(node).keys())
    ledger = node.ledger
    wait_for("its series to be let go of", lambda: not any(s.held_open for s in ledger.arrivals.open_series()))
    ledger.close()
    assert node.cli("verify").returncode == 0


def test_the_next_life_takes_up_what_all_processes_had_even_with_fewer_of_them(several):
    node = several()
    each = one_with_each(node, 3)
    ledger = node.ledger
    acknowledged = set()
    for series, association in enumerate(each.values()):
        for number in range(1, 4):
            dataset = ct(number, series=f"series {series}")
            assert association.send_c_store(as_file(dataset)).Status == 0x0000
            acknowledged.add(str(dataset.SOPInstanceUID))
    node.process.kill()  # within the second that the ledger may be behind, as a rule
    node.process.wait()
    node.settings_path.write_text(node.settings_path.read_text().replace("processes = 3", "processes = 2"))
    node.start()

    wait_for("all to be on record", lambda: stored(node).keys() == acknowledged)
    wait_for("nobody to hold a series", lambda: not any(s.held_open for s in ledger.arrivals.open_series()))
    ledger.close()
    wait_for("two to listen", lambda: len(listeners(node)) == 2, seconds=40)
    left = [path for path in (node.folder / "storage" / "arrived").rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []
    assert node.cli("verify").returncode == 0


def test_other_bytes_under_one_uid_at_the_same_moment_are_set_aside_and_the_first_stay(shared):
    node, _, _ = shared
    each = list(one_with_each(node, 3).values())
    start = threading.Barrier(3)

    def send(number: int) -> None:
        start.wait()
        for slice_number in range(1, 21):
            dataset = ct(slice_number, study="twice", pixel=number)
            assert each[number].send_c_store(as_file(dataset)).Status == 0x0000
        each[number].release()

    senders = [threading.Thread(target=send, args=[number]) for number in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(60)

    folder = node.folder / "storage" / "quarantine"
    wait_for("the others to be set aside", lambda: len(list(folder.glob("*.dcm"))) == 40)
    uids = {str(ct(number, study="twice").SOPInstanceUID) for number in range(1, 21)}
    wait_for("the first to be on record", lambda: uids <= stored(node).keys())
    aside = Counter(path.name.partition(".dcm")[0].rpartition(".")[0] for path in folder.iterdir())
    assert aside == dict.fromkeys(uids, 2)
    assert node.cli("verify").returncode == 0, "every file is the one that is on record"


def test_storage_commitment_covers_what_another_process_has_just_acknowledged(shared):
    node, _, modality = shared
    with_each = one_with_each(node, 3)
    asking = wait_for("one to ask a further process", lambda: asked_at(node, modality, RECEIVER), every=0.0)
    references = []
    for series, association in enumerate(with_each.values()):
        for number in range(1, 4):
            dataset = ct(number, study="promised", series=f"series {series}")
            assert association.send_c_store(as_file(dataset)).Status == 0x0000
            references.append(Reference(CT, str(dataset.SOPInstanceUID)))
    assert modality.ask(asking, *references) == 0x0000
    wait_for("the report", lambda: modality.reports, seconds=20)
    where, _, report = modality.reports.pop()
    assert (where, set(report.committed), report.failed) == ("same", set(references), {})

    assert modality.ask(asking, references[0], transaction_uid="1.2.840.2") == 0x0000
    asking.release()
    wait_for("the report of the node", lambda: modality.reports, seconds=20)
    where, _, report = modality.reports.pop()
    assert (where, list(report.committed)) == ("new", references[:1])
    time.sleep(2.5)  # the node looks every two
    assert modality.reports == [], "nobody reports twice"
    for association in with_each.values():
        association.release()


def asked_at(node: NodeProcess, modality: Modality, word: str):
    """Return an association of a modality with a further process."""
    association = modality.associate(node.port)
    if holder(node, association) in node.children_pids(word):
        return association
    association.release()
    return None


def test_a_port_is_shared_by_the_processes_of_one_node_and_nobody_else(several, node):
    first = several(processes=2)
    second = node(pacs_port=free_port(), node=ALONE, receive="processes = 2", port=first.port)
    second.spawn()
    assert second.process.wait(40) == 2
    assert f"port {first.port}" in second.log()
    assert len(listeners(first)) == 2


def test_a_receiver_ends_with_its_node_and_keeps_the_next_out_until_then(several):
    node = several(processes=2)
    (pid,) = node.children_pids(RECEIVER)
    os.kill(pid, signal.SIGSTOP)  # it cannot see that the node is gone
    node.process.kill()
    node.process.wait()
    node.spawn()
    assert node.process.wait(60) == 2
    assert "still receives" in node.log()
    os.kill(pid, signal.SIGCONT)
    wait_for("it to end", lambda: not node.children_pids(RECEIVER))
    node.start()
    wait_for("both to listen", lambda: len(listeners(node)) == 2, seconds=40)
    assert node.terminate() == 0
    assert not node.children_pids(RECEIVER)


@pytest.mark.peer("openssl")
def test_every_process_listens_with_tls_and_takes_a_new_certificate(several, tool, tmp_path):
    def make_certificate() -> str:
        """Put a certificate in the place of the one before, and return it."""
        command = [tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        command += ["-keyout", tmp_path / "new.key", "-out", tmp_path / "new.pem"]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        for name in ("key", "pem"):
            (tmp_path / f"new.{name}").replace(tmp_path / f"node.{name}")
        return (tmp_path / "node.pem").read_text()

    def shown() -> set[str]:
        return {ssl.get_server_certificate((HERE, port)).strip() for _ in range(12)}

    before, port = make_certificate().strip(), free_port()
    peer = f'[tls]\nport = {port}\ncertificate = "{tmp_path}/node.pem"\nkey = "{tmp_path}/node.key"\n'
    node = several(processes=2, peer=f'{peer}client_certificates = "none"')
    context = ssl.create_default_context(cafile=str(tmp_path / "node.pem"))
    context.check_hostname = False

    def associate_by_tls() -> int:
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(CT, EXPLICIT)
        association = entity.associate(HERE, port, tls_args=(context, "localhost"))
        assert association.is_established
        assert association.send_c_store(as_file(ct())).Status == 0x0000
        pid = holder(node, association, port)
        association.release()
        return pid

    found: set[int] = set()
    wait_for("each to take one", lambda: found.add(associate_by_tls()) or len(found) == 2, every=0.0)
    assert shown() == {before}
    after = make_certificate().strip()
    wait_for("each to show the new one", lambda: shown() == {after})
