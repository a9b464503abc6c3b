"""Messages are hints: a real broker that forgets, doubles and goes away changes nothing in the ledger."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dicom_node.broker import connect, prepare_embedded, socket_path, wait_until_ready
from dicom_node.config import Settings, parse
from dicom_node.dispatch import Dispatcher, Hints
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind, State
from tests.unit.test_ledger import claim, inference, names, result

ROOT = Path(__file__).parents[2]
WORKER = """
import sys, time, warnings
from pathlib import Path
from dicom_node.config import load
from dicom_node import log
from dicom_node.messages import celery_settings
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Happening
from workers.app import SecurityWarning, make_app

warnings.filterwarnings("ignore", category=SecurityWarning)
log.configure()
settings = load(Path(sys.argv[1]))
ledger = Ledger(settings.ledger_url)
pause = float(sys.argv[3])

def run(number):
    job = ledger.jobs.claim(number, worker=sys.argv[2], lease=60, now=time.time())
    with open(sys.argv[1] + ".ran", "a") as file:
        file.write(f"{number} {'ran' if job else 'nothing'}\\n")
    if job:
        time.sleep(pause)
        ledger.jobs.ended(job, Happening.REFUSED, now=time.time(), reason="fake")

def foresee(series, model):
    with open(sys.argv[1] + ".ran", "a") as file:
        file.write(f"foresaw {series} {model}\\n")

app = make_app(celery_settings(settings), run, foresee=foresee)
app.Worker(pool="solo", queues=["infer", "deliver"], hostname=sys.argv[2], loglevel="ERROR", without_mingle=True,
           without_gossip=True, without_heartbeat=True, quiet=True).start()
"""


class Broker:
    """A broker process that can be killed, started again and emptied."""

    def __init__(self, settings: Settings, command) -> None:
        self.settings, self._command = settings, command
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until_ready(self.settings, self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def flush(self) -> None:
        with connect(self.settings) as client:
            client.flushall()

    def waiting(self, queue: str = "infer") -> int:
        with connect(self.settings) as client:
            return int(client.llen(queue))


@pytest.fixture(params=["embedded", "redis-server"])
def settings(request, tmp_path, free_port) -> Settings:
    """Settings with the embedded broker, in a folder whose name is no URL, or with a Redis."""
    folder = tmp_path / "a folder%20+ä"
    folder.mkdir()
    line = ""
    if request.param == "redis-server":
        if not shutil.which("redis-server", path="/usr/bin:/usr/local/bin"):
            pytest.skip("redis-server is not installed (apt-get install redis-server)")
        line = f'broker = "redis://127.0.0.1:{free_port()}/0"'
    text = f'[node]\nstorage = "storage"\n{line}\n[jobs]\nhint_again = 1.0\n'
    (folder / "node.toml").write_text(text)
    return parse(text, base=folder)


@pytest.fixture
def ledger(settings):
    made = Ledger(settings.ledger_url, migrate=True)
    yield made
    made.close()


@pytest.fixture
def broker(settings):
    def redis_server():
        port = settings.node.broker.rsplit(":", 1)[1].partition("/")[0]
        return ["/usr/bin/redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]

    made = Broker(settings, redis_server if settings.node.broker else lambda: prepare_embedded(settings))
    yield made
    made.kill()


@pytest.fixture
def dispatcher(settings, ledger):
    made = Dispatcher(settings, ledger)
    yield made
    made.close()


@pytest.fixture
def worker(settings, ledger):
    """Starts real Celery workers around a runner that only claims and ends."""
    started = []
    path = settings.node.storage.parent / "node.toml"

    def start(name: str = "w1", pause: float = 0.0, log: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WORKER, str(path), name, str(pause)]
        with open(log, "wb") if log else contextlib.nullcontext() as output:
            started.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait(20)


def runs(settings) -> list[str]:
    path = settings.node.storage.parent / "node.toml.ran"
    return path.read_text().splitlines() if path.exists() else []


def states(ledger, numbers) -> set[State]:
    return {ledger.jobs.get(number).state for number in numbers}


def sweep_until(dispatcher, condition, *, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        dispatcher.sweep(now=time.time())
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:g} s in vain")


def test_a_due_job_becomes_one_message_and_no_second_until_that_is_old(settings, ledger, broker, dispatcher):
    inference(ledger)

    assert dispatcher.sweep(now=100.0) == 1
    assert dispatcher.sweep(now=100.9) == 0
    assert broker.waiting() == 1
    assert dispatcher.sweep(now=101.1) == 1


def test_a_flushed_broker_is_told_again(settings, ledger, broker, dispatcher):
    inference(ledger)
    dispatcher.sweep(now=100.0)

    broker.flush()

    assert dispatcher.sweep(now=102.0) == 1
    assert broker.waiting() == 1


def test_a_queue_is_kept_short_and_deliveries_have_their_own(settings, ledger, broker, dispatcher):
    held = claim(ledger, inference(ledger))
    ledger.jobs.inferred(held, [result()], now=30.0, seconds={})
    for number in range(80):
        inference(ledger, f"1.4.{number}")

    for moment in range(5):
        dispatcher.sweep(now=100.0 + 2 * moment)

    assert broker.waiting("infer") == 32
    assert 2 <= broker.waiting("deliver") <= 10


def test_who_makes_deliveries_says_so_at_once_and_the_sweep_does_not_say_it_again(settings, ledger, broker, dispatcher):
    hints = Hints(settings, ledger)
    held = claim(ledger, inference(ledger))
    deliveries = ledger.jobs.inferred(held, [result()], now=30.0, seconds={})

    assert hints.send({Kind.DELIVER: deliveries}, now=100.0) == 2

    assert broker.waiting("deliver") == 2
    assert dispatcher.sweep(now=100.5) == 0
    hints.close()


def test_a_broker_that_is_away_costs_seconds_and_no_job(settings, ledger, broker, dispatcher, worker):
    numbers = [inference(ledger, f"1.3.{n}") for n in range(3)]
    broker.kill()
    started = time.monotonic()

    assert dispatcher.sweep(now=time.time()) == 0
    assert dispatcher.sweep(now=time.time()) == 0

    assert time.monotonic() - started < 10
    assert states(ledger, numbers) == {State.QUEUED}
    broker.start()
    worker()
    sweep_until(dispatcher, lambda: states(ledger, numbers) == {State.FAILED})


def test_what_may_come_is_said_to_a_worker_that_has_nothing_to_do(settings, broker, dispatcher, worker):
    dispatcher.foresee("1.2.3", "ct_lung", within=30.0)
    assert broker.waiting() == 1
    dispatcher.foresee("1.2.4", "ct_lung", within=30.0)  # there is something to do
    assert broker.waiting() == 1

    worker()
    sweep_until(dispatcher, lambda: runs(settings) == ["foresaw 1.2.3 ct_lung"])


def test_what_may_have_come_is_of_no_interest_later(settings, ledger, broker, dispatcher, worker):
    dispatcher.foresee("1.2.3", "ct_lung", within=0.5)
    time.sleep(1.0)
    number = inference(ledger)

    worker()
    sweep_until(dispatcher, lambda: states(ledger, [number]) == {State.FAILED})

    assert runs(settings)[0] == f"{number} ran"
    assert not any("foresaw" in line for line in runs(settings))


def test_a_broker_that_is_away_is_not_asked_at_every_series(broker, dispatcher):
    broker.kill()
    dispatcher.foresee("1.2.3", "ct_lung", within=30.0)
    started = time.monotonic()

    for number in range(1000):
        dispatcher.foresee(f"1.2.{number}", "ct_lung", within=30.0)

    assert time.monotonic() - started < 1.0


def test_a_message_that_comes_twice_runs_its_job_once(settings, ledger, broker, dispatcher, worker):
    numbers = [inference(ledger, f"1.3.{n}") for n in range(3)]
    for number in numbers * 3:
        dispatcher._hints._celery.send_task("dicom_node.run", args=[number], queue="infer")

    worker("w1")
    worker("w2")
    sweep_until(dispatcher, lambda: states(ledger, numbers) == {State.FAILED} and len(runs(settings)) >= 9)

    assert sorted(line for line in runs(settings) if "ran" in line) == [f"{number} ran" for number in sorted(numbers)]
    assert all(names(ledger, number).count("job.claimed") == 1 for number in numbers)


def test_a_broker_killed_under_a_working_worker_loses_nothing(settings, ledger, broker, dispatcher, worker):
    numbers = [inference(ledger, f"1.3.{n}") for n in range(6)]
    worker(pause=0.3)
    sweep_until(dispatcher, lambda: any("ran" in line for line in runs(settings)))

    broker.kill()
    time.sleep(0.5)
    broker.start()

    sweep_until(dispatcher, lambda: states(ledger, numbers) == {State.FAILED}, seconds=60)
    assert all(names(ledger, number).count("job.claimed") == 1 for number in numbers)


def test_an_embedded_broker_left_by_an_earlier_life_is_ended(settings, broker):
    if settings.node.broker:
        pytest.skip("only the embedded one is ours to end")
    first = broker.process

    broker.start()

    assert first.wait(10) is not None
    assert broker.waiting() == 0
    assert socket_path(settings).exists()


def test_a_storage_folder_with_a_long_name_has_its_socket_elsewhere(tmp_path):
    long = parse(f'[node]\nstorage = "{"x" * 90}"', base=tmp_path)

    assert len(str(socket_path(long))) < 100
