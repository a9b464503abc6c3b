"""Who acknowledges comes before other programs, models come behind; each asked in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dicom_node.niceness import RECEIVER, WORKER
from tests.acceptance.stand import may_come_first

pytestmark = pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) != 0, reason="the tests have a place of their own")
privileged = pytest.mark.skipif(not may_come_first(), reason="it takes CAP_SYS_NICE")

_CHILD = """
import os, sys, threading
from pathlib import Path
from dicom_node.niceness import come_first, come_last

begun, end = threading.Event(), threading.Event()
threading.Thread(target=lambda: (begun.set(), end.wait())).start()  # as a library starts them when it is imported
begun.wait()
exec(sys.argv[1])
print(*{os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path("/proc/self/task").iterdir()})
end.set()
"""


def niceness(deed: str, *, chosen: int = 0) -> list[int]:
    """What the threads of a process have that did this, begun where somebody has chosen."""
    command = ["nice", "-n", str(chosen), sys.executable, "-c", _CHILD, deed]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(each) for each in ran.stdout.split()]


@privileged
def test_who_may_comes_first_with_all_threads():
    assert niceness("come_first()") == [RECEIVER]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_stays_where_it_is():
    assert niceness("os.setuid(65534); come_first()") == [0]


def test_a_place_that_somebody_chose_is_kept():
    assert niceness("come_first()", chosen=9) == [9]


def test_a_worker_comes_last_with_the_threads_that_its_libraries_started():
    assert niceness("come_last()") == [WORKER]


@privileged
def test_a_worker_of_a_node_that_comes_first_comes_last():
    assert niceness("come_first(); come_last()") == [WORKER]


def test_a_worker_goes_no_further_forward_than_where_it_was():
    assert niceness("come_last()", chosen=9) == [9]


_POLICY = """
from dicom_node.niceness import wait_asleep
wait_asleep()
import torch
"""


@pytest.mark.parametrize(("said", "policy"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_of_a_network_wait_asleep_unless_the_operator_has_said_otherwise(said, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({} if said is None else {"OMP_WAIT_POLICY": said})

    ran = subprocess.run([sys.executable, "-c", _POLICY], capture_output=True, text=True, env=environment, check=True)

    assert f"OMP_WAIT_POLICY = '{policy}'" in ran.stderr
