"""What is known of a proposal is what pynetdicom would make of it; what is personal is not known."""

from __future__ import annotations

import struct

import pydicom.config
import pytest
from pydicom.uid import JPEG2000, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.acse import ACSE
from pynetdicom.association import Association
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


def negotiated(content, supported, negotiation=proposals.Negotiation, kind=proposals.Request):
    """Return what an association has become by an A-ASSOCIATE-RQ, and the primitive that answers it."""
    association = Association(AE(), MODE_ACCEPTOR)
    association.acse = negotiation(association)
    association.acceptor.ae_title = "NODE"
    association.acceptor.supported_contexts = supported
    association.requestor.primitive = understood(content, kind)
    association.acse.negotiate_association()
    return association, association.dul.to_provider_queue.get(block=False)


def outcome(association) -> tuple:
    assert association.is_established
    return (
        *(association.requestor.ae_title, association.acceptor.primitive.called_ae_title),
        [(number, context, context.as_scp, context.as_scu) for number, context in association._accepted_cx.items()],
        *(association.rejected_contexts, association.acceptor.role_selection),
    )


CASES = [proposed(), proposed(role(CLASSES[0])), proposed(user()), proposed(classes=CLASSES[:1]),
         proposed(classes=["1.2.3.4.5"]), proposed(classes=[CLASSES[0]] * 5)]  # fmt: skip


@pytest.mark.parametrize("content", CASES, ids=range(len(CASES)))
def test_it_is_what_pynetdicom_makes_of_it_also_the_second_time(content):
    expected = said(understood(content, A_ASSOCIATE_RQ))

    assert said(understood(content)) == expected
    assert said(understood(content)) == expected


@pytest.mark.parametrize("content", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("is_unrestricted", [False, True])
def test_it_is_answered_as_pynetdicom_does_for_each_list_of_what_is_supported(content, is_unrestricted, monkeypatch):
    monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", is_unrestricted)
    for supported in (SUPPORTED, SUPPORTED, FEWER, SUPPORTED):
        theirs, answer = negotiated(content, supported, ACSE, A_ASSOCIATE_RQ)

        ours, said_again = negotiated(content, supported)

        assert outcome(ours) == outcome(theirs)
        for _ in range(2):
            assert proposals.acceptance(said_again).encode() == A_ASSOCIATE_AC(answer).encode()


def test_what_was_answered_is_answered_again_without_pynetdicom(monkeypatch):
    first, _ = negotiated(proposed(), SUPPORTED)
    monkeypatch.setattr(ACSE, "_negotiate_as_acceptor", None)

    assert outcome(negotiated(proposed(), SUPPORTED)[0]) == outcome(first)
    with pytest.raises(TypeError):
        negotiated(proposed(calling="ANOTHER"), SUPPORTED)


def test_what_is_done_to_one_association_is_not_done_to_the_next():
    for _ in range(3):
        association, _ = negotiated(proposed(), SUPPORTED)
        assert len(association._accepted_cx) == 20
        assert len(association.rejected_contexts) == 5
        association._accepted_cx.clear()
        association.rejected_contexts.clear()


def test_a_device_of_many_names_fills_no_memory():
    for number in range(50):
        association, _ = negotiated(proposed(calling=f"SCANNER{number}"), SUPPORTED)
    (known,) = proposals._understood._known.values()

    assert len(known.presentation_context_definition_list._answers) <= 8
    assert association.requestor.ae_title == "SCANNER49"


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
