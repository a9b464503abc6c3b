"""A ledger belongs to one storage folder; on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest

from dicom_node.config import parse
from dicom_node.errors import SettingsError
from dicom_node.node import Node


def node_at(tmp_path, folder: str, url: str) -> Node:
    text = f'''[node]\nhost = "127.0.0.1"\nport = 0\nstorage = "{folder}"\nledger = "{url}"
        broker = "redis://127.0.0.1:1/0"\n[receive]\nminimum_free_megabytes = 1'''
    return Node(parse(text, base=tmp_path))


def test_a_second_node_with_a_folder_of_its_own_is_refused_and_told_why(tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    first = node_at(tmp_path, "one", url)
    first.start()
    second = node_at(tmp_path, "two", url)

    with pytest.raises(SettingsError, match="every node needs a ledger of its own"):
        second.start()

    second.stop()
    first.stop()


def test_the_same_folder_is_at_home_again_and_one_that_took_its_place_can_be(tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    first = node_at(tmp_path, "one", url)
    first.start()
    first.stop()
    again = node_at(tmp_path, "one", url)
    again.start()
    again.stop()
    (tmp_path / "restored").mkdir()
    (tmp_path / "restored" / "storage.id").write_bytes((tmp_path / "one" / "storage.id").read_bytes())

    restored = node_at(tmp_path, "restored", url)

    restored.start()
    restored.stop()
