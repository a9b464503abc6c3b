from __future__ import annotations

from dicom_node.identity import identity


def test_a_node_keeps_its_name_when_its_machine_gets_another(tmp_path):
    first = identity(tmp_path, host="one", ae_title="NODE", port=104)

    assert identity(tmp_path, host="another", ae_title="OTHER", port=11112) == first == "one:NODE:104"


def test_a_name_that_a_power_cut_took_is_made_again(tmp_path):
    identity(tmp_path, host="one", ae_title="NODE", port=104)
    (tmp_path / "node.id").write_bytes(b"")

    assert identity(tmp_path, host="one", ae_title="NODE", port=104) == "one:NODE:104"


def test_the_longest_name_fits_the_ledger(tmp_path):
    assert len(identity(tmp_path, host="h" * 64, ae_title="SIXTEEN_LETTERS_", port=65535)) <= 64
