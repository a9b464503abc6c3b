"""The node over somebody else's Redis, with workers of their own: as in a hospital with a GPU machine."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

from dicom_node.demo.phantom import make_thorax, write_series
from tests.acceptance.stand import free_port, storescu, wait_for

pytestmark = [pytest.mark.peer("storescu"), pytest.mark.peer("Orthanc"), pytest.mark.peer("redis-server")]


@pytest.fixture
def redis_url(tmp_path, tool):
    """A real Redis on a loopback port."""
    port = free_port()
    command = [tool("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(10)


@pytest.fixture
def start_worker(tmp_path):
    """Starts `dicom-node-worker` with a node's settings, and ends it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(running) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "workers", "--settings", str(running.settings_path)]
        with (tmp_path / "worker.log").open("ab") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def test_a_worker_of_its_own_does_the_work(node, orthanc, redis_url, start_worker, tmp_path):
    running = node(pacs_port=orthanc.dicom_port, node=f'broker = "{redis_url}"').start()
    start_worker(running)

    storescu(running.port, *write_series(make_thorax(seed=21), tmp_path / "ct"))
    jobs = running.wait_until_idle(jobs=2)

    assert {job["state"] for job in jobs} == {"done"}
    assert len(orthanc.files_of("SEG")) == len(orthanc.files_of("SR")) == 1
    assert running.children_pids("--queue infer") == []


def test_a_worker_elsewhere_that_is_killed_is_noticed_by_its_lease(node, orthanc, redis_url, start_worker, tmp_path):
    running = node(pacs_port=orthanc.dicom_port, node=f'broker = "{redis_url}"', lease=5.0).start()
    first = start_worker(running)
    storescu(running.port, *write_series(make_thorax(seed=22), tmp_path / "ct"))
    wait_for("the job to run", lambda: [job for job in running.jobs() if job["state"] == "running"])

    first.kill()
    first.wait()
    start_worker(running)
    jobs = running.wait_until_idle(jobs=2)

    assert {job["state"] for job in jobs} == {"done"}
    (inference,) = [job for job in jobs if job["kind"] == "infer"]
    assert inference["attempts"] == 2
    assert len(orthanc.files_of("SEG")) == len(orthanc.files_of("SR")) == 1
