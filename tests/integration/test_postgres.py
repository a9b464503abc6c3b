"""The ledger's promises again, over a real PostgreSQL, with several processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from dicom_node.entities import AssociationIdentity
from dicom_node.errors import LedgerRefused
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.recorder import Recorder
from dicom_node.spool import Spool
from tests.datasets import EXPLICIT, encoded, series_of, uid
from tests.unit.test_departures import *  # noqa: F403
from tests.unit.test_ledger import *  # noqa: F403 - every test of the ledger, with the fixture below
from tests.unit.test_ledger import DIGEST, ORDER, complete, inference, instance, names, receive


def _program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A PostgreSQL server of our own on a Unix socket."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if not initdb or not pg_ctl:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="dicom-node-pg-"))  # a short path: a socket's may have 107 bytes
    runner: list[str] = []
    if os.geteuid() == 0:
        if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
        shutil.chown(folder, "postgres")
        runner = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    subprocess.run(
        [*runner, initdb, "-D", str(data), "-U", "node", "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"
    subprocess.run(
        [*runner, pg_ctl, "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start"],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    yield f"postgresql+psycopg://node@/{{}}?host={folder}"
    subprocess.run(
        [*runner, pg_ctl, "-D", str(data), "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/"
    )
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ledger_url(postgres):
    """The URL of an empty database."""
    name = f"ledger_{uuid.uuid4().hex[:12]}"
    engine = create_engine(postgres.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return postgres.format(name)


@pytest.fixture
def ledger(ledger_url):
    made = Ledger(ledger_url, migrate=True)
    yield made
    made.close()


def run_all(count: int, program: str, *arguments: str) -> list[str]:
    """Run `program` in `count` processes at once; return what each printed."""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, *arguments, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(count)
    ]
    answers = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return answers


MIGRATE = "import sys; from dicom_node.ledger import Ledger; Ledger(sys.argv[1], migrate=True).close()"
CLAIM = """
import sys, time
from dicom_node.ledger import Ledger
ledger = Ledger(sys.argv[1])
numbers = [int(n) for n in sys.argv[2].split(",")]
print(*[n for n in numbers if ledger.jobs.claim(n, worker="w" + sys.argv[3], lease=60, now=50.0)])
"""


@pytest.fixture(params=["postgresql", "sqlite"])
def either_url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    return request.getfixturevalue("ledger_url")


def test_four_nodes_migrate_an_empty_database_at_once(either_url):
    run_all(4, MIGRATE, either_url)

    ledger = Ledger(either_url)
    receive(ledger)
    assert len(ledger.arrivals.open_series()) == 1
    ledger.close()


def test_six_processes_over_sixty_jobs_are_sixty_claims(either_url):
    ledger = Ledger(either_url, migrate=True)
    numbers = [inference(ledger, f"1.3.{n}") for n in range(60)]

    answers = run_all(6, CLAIM, either_url, ",".join(map(str, numbers)))

    claimed = [int(number) for answer in answers for number in answer.split()]
    assert sorted(claimed) == numbers
    assert all(names(ledger, number) == ["job.queued", "job.claimed"] for number in numbers)
    ledger.close()


def test_a_url_without_a_driver_means_the_one_that_is_installed(ledger_url):
    ledger = Ledger(ledger_url.replace("postgresql+psycopg", "postgresql"), migrate=True)

    receive(ledger)

    assert ledger.history.counts()["instances"] == 1
    ledger.close()


def test_what_the_tables_say_is_what_the_migrations_make(ledger):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from dicom_node.ledger.schema import metadata

    with ledger._database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_text_that_postgresql_cannot_hold_is_refused_for_ever_and_not_quoted(ledger):
    with pytest.raises(LedgerRefused) as caught:
        receive(ledger, study_instance_uid="1.2\0")

    assert "1.2" not in str(caught.value)


class Garbling(Recorder):
    """Is told of a second instance what PostgreSQL holds in no column."""

    def arrived(self, arrival):
        is_second = arrival.header.sop_instance_uid == uid("study", "series", 2)
        garbled = arrival._replace(transfer_syntax_uid=f"{EXPLICIT}\0")
        super().arrived(garbled if is_second else arrival)


def test_what_postgresql_never_takes_holds_up_no_other_instance_and_keeps_its_file(ledger, tmp_path):
    spool, origin = Spool(tmp_path), AssociationIdentity("a", "SCANNER", "NODE", "127.0.0.1")
    recorder = Garbling(ledger, spool, node_id="node")
    recorder.start()
    for dataset in series_of(4):
        Intake(spool, recorder).keep(
            memoryview(encoded(dataset)),
            transfer_syntax_uid=EXPLICIT,
            affected_sop_class_uid=str(dataset.SOPClassUID),
            affected_sop_instance_uid=str(dataset.SOPInstanceUID),
            association=origin,
        )

    assert recorder.flush(timeout=20)
    recorder.stop()
    assert ledger.history.counts()["instances"] == 3
    assert len(spool.inbox.waiting()) == 1

    later = Recorder(ledger, spool, node_id="node")
    later.start()
    assert later.flush(timeout=20)
    later.stop()
    assert ledger.history.counts()["instances"] == 4
    assert spool.inbox.waiting() == []


def test_a_database_that_is_away_is_unavailable_and_comes_back(ledger, ledger_url, postgres):
    receive(ledger)
    admin = create_engine(postgres.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'ledger_%'"))
    admin.dispose()

    receive(ledger, 2)

    assert ledger.history.counts()["instances"] == 2
    assert instance().header.modality == "CT"
    assert complete(ledger, orders=[(ORDER, DIGEST)])


def test_what_a_peer_takes_is_remembered_for_a_day_and_corrected_by_the_next_answer(either_url):
    ledger = Ledger(either_url, migrate=True)
    plain, implicit = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
    ledger.peers.answered("PACS@a:1", {("1.2", plain): False, ("1.2", implicit): True, ("1.3", plain): False}, now=0.0)

    assert ledger.peers.takes("PACS@a:1", now=3600.0) == {"1.2": True, "1.3": False}
    assert ledger.peers.takes("PACS@b:1", now=3600.0) == {}
    assert ledger.peers.takes("PACS@a:1", now=90_000.0) == {}, "a PACS may have been upgraded"

    ledger.peers.answered("PACS@a:1", {("1.3", plain): True}, now=7200.0)
    assert ledger.peers.takes("PACS@a:1", now=7300.0)["1.3"] is True
    ledger.close()
