# ruff: noqa: F811 - a fixture is used under the name that it is imported by
"""Whoever can write to the broker can make the node do nothing: messages that it did not write are ignored."""

from __future__ import annotations

import json
import pickle
import stat
import time

import pytest

from dicom_node.broker import connect
from dicom_node.lifecycle import State
from dicom_node.messages import celery_settings
from dicom_node.seal import opened, sealed
from tests.integration.test_dispatch import (  # noqa: F401 - fixtures
    broker,
    dispatcher,
    ledger,
    runs,
    settings,
    states,
    sweep_until,
    worker,
)
from tests.unit.test_ledger import inference

KEY = b"k" * 64


class Runs:
    """A pickle that runs a program where it is loaded."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def task(*arguments, name: str = "dicom_node.run", embed=None, **headers) -> bytes:
    """A Celery message as Celery writes it, without the node's seal."""
    import base64

    body = base64.b64encode(json.dumps([arguments, {}, embed or {}]).encode()).decode()
    properties = {
        "correlation_id": "1",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "infer"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "1",
    }
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": name, "id": "1", "retries": 0, **headers},
        "properties": properties,
    }
    return json.dumps(message).encode()


def foreign(number: int, tmp_path) -> list[bytes]:
    callback = {"task": "dicom_node.run", "args": [number], "kwargs": {}, "options": {"queue": "deliver"}}
    return [
        b"",
        b"no JSON at all",
        b"\xff\xfe\x00",
        b"[" * 20_000,
        b"{}",
        b"null",
        b'{"__type__": "datetime", "__value__": 3}',
        pickle.dumps(Runs(tmp_path / "pickled")),
        b"x" * 1_000_000,
        task(number),  # right in every way, but for the seal
        task(987654),
        task("x", "y"),
        task(-1),
        task(10**400),
        task([number]),
        task(number, name="somebody.elses"),
        task(number, eta="2199-01-01T00:00:00Z"),
        task(number, expires="x"),
        task(number, embed={"callbacks": [callback], "chain": [callback], "errbacks": [callback], "chord": callback}),
        sealed(b"z" * 64, "infer", task(number)),  # of another node
    ]


def with_log(start, tmp_path, name="w1"):
    """A worker, and what it writes to standard error."""
    path = tmp_path / f"{name}.log"
    return start(name, log=path), lambda: path.read_text().splitlines()


def test_what_the_node_did_not_write_is_ignored_and_the_worker_lives_on(
    settings,
    ledger,
    broker,
    dispatcher,
    worker,
    tmp_path,
    eventually,
):
    number, held_back = inference(ledger), inference(ledger, "1.3.9")
    process, log = with_log(worker, tmp_path)
    with connect(settings) as client:
        for message in foreign(held_back, tmp_path) * 3:
            client.lpush("infer", message)
        client.zadd("unacked_index", {"1": 0.0, "2": 0.0})
        client.hset("unacked", mapping={"1": "no JSON", "2": json.dumps([json.loads(task(held_back)), "", "infer"])})
        dispatcher._hints._celery.send_task("dicom_node.run", args=[number], queue="infer", retry=False)

    sweep_until_ran(settings, f"{number} ran")

    eventually(lambda: broker.waiting() == 0)
    assert process.poll() is None
    assert runs(settings) == [f"{number} ran"]
    assert states(ledger, [held_back]) == {State.QUEUED}
    assert not (tmp_path / "pickled").exists()
    ignored = [line for line in log() if "message.ignored" in line]
    assert sorted(json.loads(line)["reason"] for line in ignored) == ["no seal", "wrong seal"]
    assert not any("Traceback" in line for line in log())


def sweep_until_ran(settings, line: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while line not in runs(settings):
        assert time.monotonic() < deadline, runs(settings)
        time.sleep(0.1)


def test_a_message_of_the_node_that_was_changed_or_moved_is_foreign(
    settings,
    ledger,
    broker,
    dispatcher,
    worker,
    eventually,
):
    number, other = inference(ledger), inference(ledger, "1.3.9")
    dispatcher._hints._celery.send_task("dicom_node.run", args=[other], queue="infer", retry=False)
    with connect(settings) as client:
        written = client.rpop("infer")
        client.lpush("infer", written[:64] + written[64:].replace(b"utf-8", b"UTF-8"))
        client.lpush("infer", written[:64] + task(other))
        client.lpush("deliver", written)
    dispatcher._hints._celery.send_task("dicom_node.run", args=[number], queue="infer", retry=False)
    worker()

    sweep_until_ran(settings, f"{number} ran")

    eventually(lambda: broker.waiting("deliver") == broker.waiting("infer") == 0)
    assert runs(settings) == [f"{number} ran"]


def test_a_million_foreign_messages_are_one_line_and_hold_up_no_job(
    settings,
    ledger,
    broker,
    dispatcher,
    worker,
    capsys,
):
    if settings.node.broker:
        pytest.skip("once is enough: the embedded one has the least memory")
    number = inference(ledger)
    with connect(settings) as client:
        for _ in range(100):
            client.lpush("infer", *["x"] * 10_000)
    worker()

    sweep_until(dispatcher, lambda: states(ledger, [number]) == {State.FAILED})

    assert broker.waiting() < 1000
    assert "".join(capsys.readouterr()).count("queue.emptied") == 1


def test_the_key_is_nobody_elses_and_node_and_worker_have_the_same(settings):
    first = celery_settings(settings)["broker_transport_options"]["seal_key"]
    path = settings.node.storage / "broker.key"

    assert celery_settings(settings)["broker_transport_options"]["seal_key"] == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(first) == 64
    assert list(settings.node.storage.iterdir()) == [path]


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"0" * 64, b"0" * 65, sealed(KEY, "infer", b"7")[:-1] + b"8", b"A" + sealed(KEY, "infer", b"7")[1:]],
)
def test_only_the_whole_message_under_its_seal_is_opened(data):
    assert opened(KEY, "infer", sealed(KEY, "infer", b"7")) == b"7"
    assert opened(KEY, "infer", data) is None
    assert opened(KEY, "deliver", sealed(KEY, "infer", b"7")) is None
    assert opened(b"j" * 64, "infer", sealed(KEY, "infer", b"7")) is None
