"""A whole node on a disk that fills up: the door shuts before anything else fails, and opens again by itself."""

from __future__ import annotations

import os
import subprocess

import pytest

from dicom_node.config import parse
from dicom_node.node import Node
from tests.datasets import CT, EXPLICIT, as_file, ct

MEGABYTE = 1024 * 1024


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB that holds spool and ledger."""
    folder = tmp_path / "storage"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder]).returncode:
        pytest.skip("only root can mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def node(tmp_path, small_disk):
    settings = parse(
        """[node]\nhost = "127.0.0.1"\nport = 0\nstorage = "storage"\nbroker = "redis://127.0.0.1:1/0"
        [receive]\nminimum_free_megabytes = 20""",
        base=tmp_path,
    )
    made = Node(settings)
    made.port = made.start()
    yield made
    made.stop()


def store(node: Node, number: int) -> int:
    from pynetdicom import AE

    entity = AE(ae_title="SCANNER")
    entity.add_requested_context(CT, EXPLICIT)
    association = entity.associate("127.0.0.1", node.port)
    try:
        return int(association.send_c_store(as_file(ct(number))).Status)
    finally:
        association.release()


def events(node: Node) -> list[str]:
    return [row["name"] for row in node.ledger.history.recent_events(limit=1000) if row["name"].startswith("door.")]


def test_a_disk_that_fills_shuts_the_door_for_c_store_and_nothing_else_and_room_opens_it(node, small_disk, eventually):
    assert store(node, 1) == 0x0000
    filler = small_disk / "filler"
    filler.write_bytes(bytes(14 * MEGABYTE))

    node.tick(now=1.0)
    answers = {store(node, 2) for _ in range(5)}
    node.tick(now=2.0)

    assert answers == {0xA700}
    assert not list((small_disk / "incoming").iterdir())
    assert events(node) == ["door.shut"], "noted once, in a ledger that still has room"
    assert store(node, 1) == 0xA700, "whether it is held already is asked when it has arrived"

    filler.unlink()

    assert eventually(lambda: store(node, 2) == 0x0000)
    node.tick(now=9.0)
    assert events(node) == ["door.shut", "door.opened"]
