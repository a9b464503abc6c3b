"""Storage commitment in both roles, over real sockets: a scripted peer for what Orthanc never does, and Orthanc."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.request

import pytest
from pydicom import dcmread
from pynetdicom import AE, build_role, evt

from dicom_node.commitment import (
    STORAGE_COMMITMENT,
    STORAGE_COMMITMENT_INSTANCE,
    Reference,
    Report,
    Request,
    read_report,
    read_request,
    report_dataset,
    request_dataset,
)
from dicom_node.intake import Intake
from dicom_node.ledger.moving import StoredResult
from dicom_node.lifecycle import State
from dicom_node.promising import Promising
from dicom_node.recorder import Recorder
from dicom_node.routing import Order
from dicom_node.scp import Scp
from tests.acceptance.stand import OrthancProcess
from tests.datasets import CT, EXPLICIT, IMPLICIT, as_file, ct, uid, write
from workers.delivering import Delivering
from workers.pipeline import Pipeline
from workers.stopwatch import Stopwatch

HERE = "127.0.0.1"
NEVER_SENT = Reference(CT, "1.2.3.4.5")


def report_of(event) -> Report:
    return read_report(event.request.EventInformation.getvalue(), is_implicit=True)


def reference(number: int) -> Reference:
    return Reference(CT, uid("study", "series", number))


# -- the node is asked ------------------------------------------------------------------------------------


class Modality:
    """Asks for commitment; takes reports on the association that asked, and as an SCP of its own."""

    def __init__(self, *, answer=lambda: 0x0000) -> None:
        self.reports: list[tuple[str, int, Report]] = []
        self.asked = 0  # how often it was to take one
        self._answer = answer
        self.entity = AE(ae_title="MODALITY")
        self.entity.acse_timeout = self.entity.dimse_timeout = 5
        self.entity.add_supported_context(STORAGE_COMMITMENT, [IMPLICIT], scu_role=False, scp_role=True)
        self.server = self.entity.start_server((HERE, 0), block=False, evt_handlers=self.handlers("new"))
        self.port = self.server.socket.getsockname()[1]

    def handlers(self, where: str):
        def take(event):
            self.asked += 1
            status = self._answer()
            if status == 0x0000:
                self.reports.append((where, event.request.EventTypeID, report_of(event)))
            return status, None

        return [(evt.EVT_N_EVENT_REPORT, take)]

    def associate(self, port: int):
        entity = AE(ae_title="MODALITY")
        entity.acse_timeout = entity.dimse_timeout = 5
        entity.add_requested_context(STORAGE_COMMITMENT, IMPLICIT)
        entity.add_requested_context(CT, EXPLICIT)
        return entity.associate(HERE, port, ae_title="DICOM_NODE", evt_handlers=self.handlers("same"))

    def ask(self, association, *references: Reference, transaction_uid: str = "1.2.840.1") -> int:
        data = request_dataset(Request(transaction_uid, references))
        status, _ = association.send_n_action(data, 1, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)
        return status.Status


@pytest.fixture
def modality():
    made = []

    def make(**script) -> Modality:
        made.append(Modality(**script))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()


@pytest.fixture
def promising_node(tmp_path, ledger, request):
    """Starts an SCP that promises; `start(modality_port)` gives it an address to report to."""
    made = []

    def start(port: int | None = None, extra: str = "", ae_title: str = "MODALITY") -> tuple[Scp, int]:
        from dicom_node.config import parse
        from dicom_node.spool import Spool

        peer = f'[peer.CT1]\nae_title = "{ae_title}"\nhost = "{HERE}"\nport = {port}\n' if port else ""
        settings = parse(
            f"""[node]\nhost = "{HERE}"\nport = 0\nstorage = "storage"\n[receive]\nminimum_free_megabytes = 1
            [delivery]\nfirst_delay = 0.1\nmaximum_delay = 0.3\nconnect_timeout = 2\nresponse_timeout = 3
            [commitment]\nsame_association_after = 0.3\n{extra}\n{peer}""",
            base=tmp_path,
        )
        spool = Spool(settings.node.storage)
        recorder = Recorder(ledger, spool, node_id="node")
        recorder.start()
        promising = Promising(settings, ledger, spool, recorder)
        scp = Scp(settings, ledger, Intake(spool, recorder), recorder, promising)
        listening = scp.start()
        promising.start()
        made.append((promising, scp, recorder))
        return scp, listening

    start.end = lambda: [part.stop() for pair in made for part in pair] and made.clear()
    yield start
    start.end()


def stored(association, *numbers: int) -> None:
    for number in numbers:
        assert association.send_c_store(as_file(ct(number), EXPLICIT)).Status == 0x0000


def test_a_modality_that_waits_gets_the_report_on_its_own_association(promising_node, modality, eventually):
    _, port = promising_node()
    scanner = modality()
    association = scanner.associate(port)
    stored(association, 1, 2)

    assert scanner.ask(association, reference(1), reference(2)) == 0x0000
    eventually(lambda: scanner.reports)

    assert association.send_c_echo is not None
    assert association.is_established
    association.release()
    where, event_type, report = scanner.reports[0]
    assert (where, event_type) == ("same", 1)
    assert report == Report("1.2.840.1", (reference(1), reference(2)), {})


def test_a_modality_that_leaves_gets_the_report_on_a_new_association(promising_node, modality, eventually):
    scanner = modality()
    _, port = promising_node(scanner.port)
    association = scanner.associate(port)
    stored(association, 1)

    assert scanner.ask(association, reference(1), NEVER_SENT) == 0x0000
    association.release()
    eventually(lambda: scanner.reports)

    where, event_type, report = scanner.reports[0]
    assert (where, event_type) == ("new", 2)
    assert report == Report("1.2.840.1", (reference(1),), {NEVER_SENT: 0x0112})


@pytest.fixture
def hesitant(modality, eventually):
    """Starts a modality that has asked and does not answer the report yet: it, its association, and what lets it."""

    def start(promising_node, *, has_address: bool = True, patience: float | None = None):
        may_answer = threading.Event()
        scanner = modality(answer=lambda: 0x0000 if may_answer.wait(10) else 0x0110)
        scp, port = promising_node(scanner.port if has_address else None)
        association = scanner.associate(port)
        if patience is not None:
            (opened,) = scp._associations.listed()
            opened.association.dimse_timeout = patience
        stored(association, 1)
        assert scanner.ask(association, reference(1)) == 0x0000
        eventually(lambda: scanner.asked)
        return scanner, association, may_answer

    return start


def test_what_crosses_with_a_report_is_served_and_the_report_is_taken(promising_node, hesitant, eventually):
    """A modality may go on storing and asking before it answers: only the node's next report waits for its answer."""
    scanner, association, may_answer = hesitant(promising_node, has_address=False)

    stored(association, 2)
    assert scanner.ask(association, reference(2), transaction_uid="1.2.840.2") == 0x0000
    assert scanner.ask(association, reference(1), transaction_uid="1.2.840.3") == 0x0000
    may_answer.set()
    eventually(lambda: len(scanner.reports) == 3)

    assert association.is_established
    association.release()
    assert {where for where, _, _ in scanner.reports} == {"same"}
    assert sorted((report for _, _, report in scanner.reports), key=lambda report: report.transaction_uid) == [
        Report("1.2.840.1", (reference(1),), {}),
        Report("1.2.840.2", (reference(2),), {}),
        Report("1.2.840.3", (reference(1),), {}),
    ]


def test_a_modality_that_releases_instead_of_answering_is_not_kept_waiting(promising_node, hesitant, eventually):
    scanner, association, may_answer = hesitant(promising_node)

    association.release()
    assert association.is_released
    may_answer.set()

    eventually(lambda: [where for where, _, _ in scanner.reports if where == "new"])


def test_a_modality_that_does_not_answer_loses_the_association(promising_node, hesitant, eventually):
    scanner, association, may_answer = hesitant(promising_node, patience=0.5)

    eventually(lambda: association.is_aborted)
    may_answer.set()

    eventually(lambda: [where for where, _, _ in scanner.reports if where == "new"])


def test_bytes_that_are_no_longer_what_was_received_are_not_promised(promising_node, modality, eventually, tmp_path):
    scanner = modality()
    _, port = promising_node()
    association = scanner.associate(port)
    stored(association, 1, 2, 3)
    studies = tmp_path / "storage" / "studies"
    eventually(lambda: len(list(studies.rglob("*.dcm"))) == 3)
    first, second, _ = sorted(studies.rglob("*.dcm"), key=lambda path: dcmread(path).InstanceNumber)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    second.unlink()
    other_class = Reference("1.2.840.10008.5.1.4.1.1.4", reference(3).sop_instance_uid)

    scanner.ask(association, reference(1), reference(2), reference(3), other_class)
    eventually(lambda: scanner.reports)

    association.release()
    assert scanner.reports[0][2] == Report(
        "1.2.840.1", (reference(3),), {reference(1): 0x0110, reference(2): 0x0110, other_class: 0x0119}
    )


def test_a_report_that_is_not_taken_is_sent_again_until_it_is(promising_node, modality, eventually, ledger):
    answers = iter([0x0110, 0x0110, 0x0000])
    scanner = modality(answer=lambda: next(answers))
    _, port = promising_node(scanner.port)
    association = scanner.associate(port)
    stored(association, 1)

    scanner.ask(association, reference(1))
    association.release()
    eventually(lambda: scanner.reports)

    names = [event["name"] for event in ledger.history.recent_events(limit=100) if "commitment" in event["name"]]
    eventually(lambda: ledger.commitments.due(now=time.time() + 1e6, limit=9) == [])
    assert names[:3] == ["commitment.requested", "commitment.postponed", "commitment.postponed"]


def test_a_request_outlives_the_node(promising_node, modality, eventually):
    scanner = modality()
    _, port = promising_node(scanner.port, extra="[jobs]\nsweep = 1")
    association = scanner.associate(port)
    stored(association, 1)
    scanner.ask(association, reference(1))
    association.abort()
    promising_node.end()
    assert scanner.reports == []

    promising_node(scanner.port)

    eventually(lambda: scanner.reports)
    assert scanner.reports[0][2].committed == (reference(1),)


def test_an_address_that_nobody_has_told_is_asked_for_by_name(promising_node, modality, eventually, ledger):
    scanner = modality()
    _, port = promising_node()
    association = scanner.associate(port)
    scanner.ask(association, reference(1))
    association.release()

    def reasons():
        return [
            event["fields"]["reason"] for event in ledger.history.recent_events(limit=99) if "reason" in event["fields"]
        ]

    assert 'no [peer.NAME] has ae_title = "MODALITY"' in eventually(reasons)[0]


@pytest.mark.parametrize(
    ("action", "instance", "data", "status"),
    [
        (2, STORAGE_COMMITMENT_INSTANCE, Request("1.2.3", (reference(1),)), 0x0123),
        (1, "1.2.840.10008.1.20.1.2", Request("1.2.3", (reference(1),)), 0x0112),
        (1, STORAGE_COMMITMENT_INSTANCE, Request("", (reference(1),)), 0x0115),
        (1, STORAGE_COMMITMENT_INSTANCE, Request("1.2.3", ()), 0x0115),
        (1, STORAGE_COMMITMENT_INSTANCE, None, 0x0115),
    ],
)
def test_a_request_that_asks_for_nothing_is_answered_with_what_is_wrong(
    promising_node, modality, action, instance, data, status
):
    _, port = promising_node()
    association = modality().associate(port)
    dataset = None if data is None else request_dataset(data)

    answer, _ = association.send_n_action(dataset, action, STORAGE_COMMITMENT, instance)

    association.release()
    assert answer.Status == status


def test_a_node_that_is_told_to_promise_nothing_says_so(promising_node, modality):
    _, port = promising_node(extra="answer = false")
    scanner = modality()
    association = scanner.associate(port)

    assert scanner.ask(association, reference(1)) == 0x0124
    association.release()


# -- the node asks ----------------------------------------------------------------------------------------


class Archive:
    """A PACS that stores, is asked to commit, and reports as its script says."""

    def __init__(self, *, report, where="same", offers=True, answers=()) -> None:
        self.answers = list(answers)  # to the first C-STOREs; 0x0000 to all others
        self.stored: list[str] = []
        self.requests: list[Request] = []
        self.node_port = 0
        self.statuses: list[int] = []
        self._report, self._where = report, where
        self.entity = AE(ae_title="PACS")
        self.entity.add_supported_context(CT, [EXPLICIT, IMPLICIT])
        if offers:
            self.entity.add_supported_context(STORAGE_COMMITMENT, [IMPLICIT])
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_N_ACTION, self._action),
            (evt.EVT_DIMSE_SENT, self._answered),
        ]
        self.server = self.entity.start_server((HERE, 0), block=False, evt_handlers=handlers)
        self.port = self.server.socket.getsockname()[1]

    def _store(self, event):
        self.stored.append(str(event.request.AffectedSOPInstanceUID))
        return self.answers.pop(0) if self.answers else 0x0000

    def _action(self, event):
        self.requests.append(read_request(event.request.ActionInformation.getvalue(), is_implicit=True))
        return 0x0000, None

    def _answered(self, event):
        """After the response to the N-ACTION: report on the same association, from its own thread."""
        if type(event.message).__name__ == "N_ACTION_RSP" and self._where == "same":
            self.send(event.assoc)

    def send(self, association) -> None:
        said = self._report(self.requests[-1], len(self.requests))
        if said is not None:
            status, _ = association.send_n_event_report(
                report_dataset(said), said.event_type_id, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
            )
            self.statuses.append(status.get("Status"))

    def report_on_a_new_association(self, *, with_roles: bool = True) -> None:
        entity = AE(ae_title="PACS")
        entity.add_requested_context(STORAGE_COMMITMENT, IMPLICIT)
        roles = [build_role(STORAGE_COMMITMENT, scp_role=True)] if with_roles else None
        association = entity.associate(HERE, self.node_port, ae_title="DICOM_NODE", ext_neg=roles)
        assert association.accepted_contexts
        self.send(association)
        association.release()


def all_committed(request: Request, _round: int) -> Report:
    return Report(request.transaction_uid, request.references, {})


@pytest.fixture
def archive():
    made = []

    def make(**script) -> Archive:
        made.append(Archive(**{"report": all_committed, **script}))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()


class Sender:
    """A node's deliveries and its SCP, with one delivery of two objects to do."""

    def __init__(self, receiver, tmp_path, port: int, *, ae_title="PACS") -> None:
        self.node = receiver(
            f"""[receive]\nminimum_free_megabytes = 1
            [delivery]\nfirst_delay = 0.01\nmaximum_delay = 0.02\nconnect_timeout = 2\nresponse_timeout = 3
            [commitment]\nreport_wait = 1\nask_again_after = 60
            [peer.PACS]\nae_title = "{ae_title}"\nhost = "{HERE}"\nport = {port}\ncommitment = true
            """
        )
        self.ledger = self.node.ledger
        association = self.node.associate((CT, EXPLICIT))
        association.send_c_store(as_file(ct(9), EXPLICIT))
        association.release()
        self.delivering = Delivering(self.node.settings, self.ledger, self.node.spool)
        self.pipeline = Pipeline(self.node.settings, self.ledger, self.node.spool, worker="test")
        self.job_id = self._delivery(tmp_path)

    def _delivery(self, tmp_path) -> int:
        deadline = time.time() + 5
        while [series.held_open for series in self.ledger.arrivals.open_series()] != [False]:
            assert time.time() < deadline
            time.sleep(0.02)
        (series,) = self.ledger.arrivals.open_series()
        order = Order("a_model", send_to=("PACS",), routes=("route",))
        (number,) = self.ledger.jobs.complete(
            series.series_instance_uid,
            revision=1,
            last_activity=series.last_activity,
            reason="test",
            orders=[(order, "0" * 64)],
            now=time.time(),
        )
        held = self.ledger.jobs.claim(number, worker="test", lease=60, now=time.time())
        results = []
        for each in (1, 2):
            content = write(ct(each), tmp_path / f"{each}.dcm").read_bytes()
            uids = [uid("study", "series", each), CT, uid("study", "series"), uid("study"), EXPLICIT]
            path, sha256 = self.node.spool.keep_result(uids[0], content)
            assert sha256 == hashlib.sha256(content).hexdigest()
            results.append(StoredResult(*uids, "seg", path, sha256, len(content)))
        (delivery,) = self.ledger.jobs.inferred(held, results, now=time.time(), seconds={})
        return delivery

    def deliver(self):
        """Let the worker have the job once, as often as it is due."""
        time.sleep(0.05)
        self.pipeline.run(self.job_id)
        return self.job

    @property
    def job(self):
        return self.ledger.jobs.get(self.job_id)

    def events(self) -> list[str]:
        return [event["name"] for event in self.ledger.history.events_of_job(self.job_id)]


@pytest.fixture
def sender(receiver, tmp_path):
    return lambda port, **options: Sender(receiver, tmp_path, port, **options)


BOTH = [uid("study", "series", number) for number in (1, 2)]


def test_a_delivery_is_done_when_the_report_on_its_own_association_says_so(archive, sender):
    pacs = archive()
    node = sender(pacs.port)

    job = node.deliver()

    assert job.state is State.DONE
    assert node.events()[-3:] == ["job.claimed", "job.handed_over", "job.committed"]
    assert sorted(each.sop_instance_uid for each in pacs.requests[0].references) == BOTH
    assert pacs.statuses == [0x0000]


def test_what_a_delivery_sent_and_what_it_did_not_is_in_the_audit_trail(archive, sender):
    pacs = archive(answers=[0x0000, 0xA700])
    node = sender(pacs.port)

    node.deliver()
    node.deliver()

    lines = [each for each in node.ledger.history.audit(limit=100) if each["fields"].get("to", "").startswith("PACS")]
    told = [(each["fields"]["event"], each["fields"]["indicator"], each["fields"]["instances"]) for each in lines]
    assert told == [("110102", 0, 2), ("110104", 0, 1), ("110104", 4, 1), ("110102", 0, 2), ("110104", 0, 2)]
    assert {each["study_instance_uid"] for each in lines} == {uid("study")}


@pytest.mark.parametrize("with_roles", [True, False])
def test_a_delivery_waits_for_a_report_on_a_new_association(archive, sender, with_roles):
    pacs = archive(where="new")
    node = sender(pacs.port)

    assert node.deliver().state is State.COMMITTING

    pacs.node_port = node.node.port
    pacs.report_on_a_new_association(with_roles=with_roles)
    assert pacs.statuses == [0x0000]
    assert node.job.state is State.DONE
    assert node.job.detail == "2 instances committed"


def test_what_is_not_committed_is_sent_again_and_only_that(archive, sender):
    def second_fails_first(request, number):
        if number > 1:
            return all_committed(request, number)
        first, second = request.references
        return Report(request.transaction_uid, (first,), {second: 0x0112})

    pacs = archive(report=second_fails_first)
    node = sender(pacs.port)

    assert node.deliver().state is State.QUEUED
    assert node.job.detail == "failure reasons 0x0112"
    assert node.deliver().state is State.DONE

    sent_again = pacs.requests[0].references[1].sop_instance_uid
    assert pacs.stored[2:] == [sent_again]
    assert [each.sop_instance_uid for each in pacs.requests[1].references] == [sent_again]
    assert pacs.requests[0].transaction_uid != pacs.requests[1].transaction_uid


@pytest.mark.parametrize("reason", [0x0119, 0x0122])
def test_a_peer_that_will_never_commit_fails_the_delivery(archive, sender, reason):
    pacs = archive(
        report=lambda request, _: Report(request.transaction_uid, (), dict.fromkeys(request.references, reason))
    )
    node = sender(pacs.port)

    job = node.deliver()

    assert (job.state, job.reason, job.detail) == (State.FAILED, "not_committed", f"failure reasons 0x{reason:04X}")


def test_a_peer_that_does_not_report_is_asked_again_and_nothing_is_sent_twice(archive, sender):
    pacs = archive(report=lambda request, number: all_committed(request, number) if number > 1 else None)
    node = sender(pacs.port)
    assert node.deliver().state is State.COMMITTING

    patience = node.node.settings.delivery.patience
    assert node.ledger.commitments.overdue(now=time.time() + 59, patience=patience) == 0
    assert node.ledger.commitments.overdue(now=time.time() + 61, patience=patience) == 1
    with_due = node.ledger.jobs.claim(node.job_id, worker="test", lease=60, now=time.time() + 62)
    node.delivering(with_due, Stopwatch())

    assert node.job.state is State.DONE
    assert sorted(pacs.stored) == BOTH
    assert len(pacs.requests) == 2


def test_a_peer_without_storage_commitment_is_no_place_to_deliver_to(archive, sender):
    node = sender(archive(offers=False).port)

    job = node.deliver()

    assert job.state is State.FAILED
    assert "PACS offers no storage commitment" in job.detail


def test_a_report_that_nobody_asked_for_is_refused_and_changes_nothing(archive, sender):
    pacs = archive(where="new", report=lambda request, _: Report("1.2.3.9", request.references, {}))
    node = sender(pacs.port)
    node.deliver()

    pacs.node_port = node.node.port
    pacs.report_on_a_new_association()

    assert pacs.statuses == [0x0115]
    assert node.job.state is State.COMMITTING


def test_a_report_may_come_twice_and_in_parts(archive, sender):
    pacs = archive(where="new")
    node = sender(pacs.port)
    node.deliver()
    request, patience = pacs.requests[0], node.node.settings.delivery.patience
    first, second = request.references

    for references in ((first,), (first,)):
        assert node.ledger.commitments.reported(
            Report(request.transaction_uid, references, {}), now=time.time(), patience=patience
        )
        assert node.job.state is State.COMMITTING
    node.ledger.commitments.reported(Report(request.transaction_uid, (second,), {}), now=time.time(), patience=patience)

    assert node.job.state is State.DONE


# -- Orthanc ----------------------------------------------------------------------------------------------


@pytest.fixture
def orthanc(tmp_path, tool, free_port):
    made = []

    def start(node_port: int, dicom_port: int) -> OrthancProcess:
        process = OrthancProcess(tool("Orthanc"), tmp_path / "orthanc", dicom_port=dicom_port, http_port=free_port())
        path = tmp_path / "orthanc" / "orthanc.json"
        settings = json.loads(path.read_text())
        settings["DicomModalities"] = {"node": ["DICOM_NODE", HERE, node_port]}
        path.write_text(json.dumps(settings))
        process.start()
        made.append(process)
        return process

    yield start
    for process in made:
        process.stop()


@pytest.mark.peer("Orthanc")
def test_orthanc_commits_what_it_was_sent(sender, orthanc, free_port, eventually):
    port = free_port()
    node = sender(port, ae_title="ORTHANC")
    orthanc(node.node.port, port)

    node.deliver()

    eventually(lambda: node.job.state is State.DONE)
    assert node.job.detail == "2 instances committed"


@pytest.mark.peer("Orthanc")
def test_orthanc_is_promised_what_it_has_sent_and_nothing_else(
    promising_node, orthanc, eventually, free_port, tmp_path
):
    dicom_port = free_port()
    _, port = promising_node(dicom_port, ae_title="ORTHANC")
    base = f"http://{HERE}:{orthanc(port, dicom_port).http_port}"

    def post(path: str, data: bytes):
        with urllib.request.urlopen(urllib.request.Request(base + path, data=data), timeout=30) as answer:
            return json.load(answer)

    def outcome():
        with urllib.request.urlopen(f"{base}/storage-commitment/{asked['ID']}", timeout=30) as answer:
            found = json.load(answer)
        return found if found["Status"] != "Pending" else None

    files = [write(ct(number), tmp_path / f"{number}.dcm").read_bytes() for number in (1, 2)]
    instances = [post("/instances", content)["ID"] for content in files]
    post("/modalities/node/store", json.dumps(instances[:1]).encode())

    asked = post("/modalities/node/storage-commitment", json.dumps({"Resources": instances}).encode())
    found = eventually(outcome)

    assert found["Status"] == "Failure"
    assert [each["SOPInstanceUID"] for each in found["Success"]] == [reference(1).sop_instance_uid]
    assert [each["SOPInstanceUID"] for each in found["Failures"]] == [reference(2).sop_instance_uid]
