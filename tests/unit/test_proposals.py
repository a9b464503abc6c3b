"""What is known of a proposal is what pynetdicom would make of it; what is personal is not known."""

from __future__ import annotations

import struct

import pydicom.config
import pytest
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import presentation
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import build_context

from dicom_node import proposals, wire
from dicom_node.services import STORAGE_SOP_CLASSES

CLASSES = [each.uid for each in STORAGE_SOP_CLASSES]
SUPPORTED = [build_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]) for uid in CLASSES[:20]]
FEWER = [build_context(uid, [JPEG2000]) for uid in CLASSES[:3]]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    assert wire  # it amends pynetdicom
    monkeypatch.setattr(proposals, "_understood", proposals.Lately())
    monkeypatch.setattr(proposals, "_encoded", proposals.Lately())
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)  # as the node has it


def proposed(*items, classes=CLASSES[:25], syntaxes=(JPEG2000, ImplicitVRLittleEndian), calling="SCANNER") -> bytes:
    asked = A_ASSOCIATE()
    asked.calling_ae_title, asked.called_ae_title = calling, "NODE"
    asked.application_context_name = "1.2.840.10008.3.1.1.1"
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 16382, "1.2.3.4"
    asked.user_information = [length, implementation, *items]
    contexts = [build_context(uid, list(syntaxes)) for uid in classes]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    asked.presentation_context_definition_list = contexts
    return A_ASSOCIATE_RQ(asked).encode()


def role(uid):
    made = SCP_SCU_RoleSelectionNegotiation()
    made.sop_class_uid, made.scu_role, made.scp_role = uid, True, True
    return made


def user(kind=2, name=b"nurse", passcode=b"secret"):
    made = UserIdentityNegotiation()
    made.user_identity_type, made.primary_field, made.secondary_field = kind, name, passcode
    return made


def understood(content, kind=proposals.Request):
    request = kind()
    request.decode(content)
    return request.to_primitive()


def said(primitive) -> tuple:
    return (
        *(primitive.calling_ae_title, primitive.called_ae_title, primitive.application_context_name),
        *(primitive.result, primitive.presentation_context_definition_list, primitive.user_information),
    )


def acceptance(results, kind, calling="SCANNER") -> bytes:
    answer = A_ASSOCIATE()
    answer.application_context_name = "1.2.840.10008.3.1.1.1"
    answer.calling_ae_title, answer.called_ae_title, answer.result, answer.result_source = calling, "NODE", 0, 1
    answer.presentation_context_definition_results_list = results
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received, implementation.implementation_class_uid = 131072, "1.2.3.5"
    answer.user_information = [length, implementation]
    return kind(answer).encode()


CASES = [proposed(), proposed(role(CLASSES[0])), proposed(user()), proposed(classes=CLASSES[:1]),
         proposed(classes=["1.2.3.4.5"]), proposed(classes=[CLASSES[0]] * 5)]  # fmt: skip


@pytest.mark.parametrize("content", CASES, ids=range(len(CASES)))
def test_it_is_what_pynetdicom_makes_of_it_also_the_second_time(content):
    expected = said(understood(content, A_ASSOCIATE_RQ))

    assert said(understood(content)) == expected
    assert said(understood(content)) == expected


@pytest.mark.parametrize("content", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("name", ["negotiate_as_acceptor", "negotiate_unrestricted"])
def test_it_is_negotiated_as_pynetdicom_does_for_each_list_of_what_is_supported(content, name):
    ours, theirs = getattr(proposals.acse, name), getattr(presentation, name)
    assert ours is not theirs
    roles = {CLASSES[0]: (True, True)} if content == CASES[1] else None
    for supported in (SUPPORTED, FEWER, SUPPORTED):
        plain = understood(content, A_ASSOCIATE_RQ).presentation_context_definition_list
        expected = theirs(plain, supported, roles)
        contexts = understood(content).presentation_context_definition_list

        found = ours(contexts, supported, roles)

        assert found == expected
        assert [(each.as_scp, each.as_scu) for each in found[0]] == [(each.as_scp, each.as_scu) for each in expected[0]]


def test_what_is_done_to_one_answer_is_not_done_to_the_next():
    contexts = understood(proposed()).presentation_context_definition_list
    answered, _ = proposals.acse.negotiate_as_acceptor(contexts, SUPPORTED, {})
    number = len(answered)
    answered.clear()

    assert len(proposals.acse.negotiate_as_acceptor(contexts, SUPPORTED, {})[0]) == number


def test_it_is_answered_as_pynetdicom_does_also_the_second_time_and_to_another():
    results, _ = presentation.negotiate_as_acceptor(
        understood(CASES[0]).presentation_context_definition_list, SUPPORTED
    )
    fewer, _ = presentation.negotiate_as_acceptor(understood(CASES[0]).presentation_context_definition_list, FEWER)
    for answer in (results, results, fewer, fewer, results):
        for calling in ("SCANNER", "ANOTHER"):
            assert acceptance(answer, proposals.Acceptance, calling) == acceptance(answer, A_ASSOCIATE_AC, calling)


def test_another_device_that_proposes_the_same_keeps_its_name():
    understood(proposed())

    assert understood(proposed(calling="ANOTHER")).calling_ae_title == "ANOTHER"
    assert understood(proposed()).calling_ae_title == "SCANNER"
    assert len(proposals._understood) == 1


def test_a_rejection_does_not_stay_with_what_was_proposed():
    understood(proposed()).result = 1

    assert understood(proposed()).result is None


def test_who_the_user_is_is_not_remembered():
    understood(proposed(user()))

    assert not len(proposals._understood)


def test_a_sender_that_makes_up_proposals_fills_no_memory():
    for number in range(200):
        understood(proposed(classes=[f"1.2.{number}"]))
    uids = [f"1.2.{'3' * 50}.{number}" for number in range(100, 228)]
    understood(proposed(classes=uids, syntaxes=uids[:4]))

    assert len(proposals._understood) == 64
    assert sum(map(len, proposals._understood._known)) < 64 * 400


def test_what_is_proposed_often_is_known_for_long():
    for number in range(200):
        understood(proposed())
        understood(proposed(classes=[f"1.2.{number}"]))

    assert proposed()[74:] in proposals._understood._known


def test_a_broken_proposal_is_refused_each_time():
    broken = proposed()[:-20]

    for _ in range(2):
        with pytest.raises(struct.error):
            understood(broken)
    assert not len(proposals._understood)
