"""Every earlier schema comes forward with its data in place, on SQLite and on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, create_engine, text

import dicom_node.ledger.database
from dicom_node.errors import LedgerUnavailable, SettingsError
from dicom_node.ledger import Ledger
from dicom_node.ledger.database import newest_revision, open_database
from dicom_node.ledger.schema import metadata
from dicom_node.lifecycle import State
from dicom_node.retention import Ground
from tests.integration.test_postgres import either_url, ledger_url, postgres  # noqa: F401 - fixtures
from tests.unit.test_ledger import claim, complete, receive

MIGRATIONS = Path(dicom_node.ledger.database.__file__).parent / "migrations"
REVISIONS = sorted(path.name[:4] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))
CT, SEG, EXPLICIT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.1.2.1"


def _job(number: int, kind: str, state: str, series: str, **values: Any) -> dict[str, Any]:
    return {
        "job_id": number, "kind": kind, "key": f"{kind}/{number}", "state": state, "series_instance_uid": series,
        "revision": 1, "model": "ct_lung", "routes": ["chest"], "send_to": ["PACS"], "parent_id": None, "peer": None,
        "attempts": 1, "not_before": 3.5, "hinted_at": 4.0, "worker": "node#infer:17", "lease_token": None,
        "lease_until": None, "progress": 1.0, "reason": None, "detail": None, "created_at": 3.5, "wanted_since": 3.5,
        "started_at": 4.0, "ended_at": 9.25, **values,
    }  # fmt: skip


def _series(uid: str, study: str, complete_revision: int, promised_at: float | None = None) -> dict[str, Any]:
    return {
        "series_instance_uid": uid, "study_instance_uid": study, "modality": "CT", "calling_ae_title": "SCANNER",
        "is_own_result": False, "revision": 1, "complete_revision": complete_revision, "received": 2,
        "announced": None, "last_activity": 2.0, "released": True, "promised_at": promised_at,
    }  # fmt: skip


def _instance(series: str, number: int) -> dict[str, Any]:
    return {
        "sop_instance_uid": f"{series}.{number}", "sop_class_uid": CT, "series_instance_uid": series,
        "transfer_syntax_uid": EXPLICIT, "number_of_frames": 1,
        "place": [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [-100.0, 0.1, 5.0 * number]],
        "path": f"studies/x/{series}/{series}.{number}.dcm", "sha256": f"{number:064x}", "digest": f"{number:064x}",
        "size": 2**33,
        "received_at": 1.000001,
    }  # fmt: skip


def _result(uid: str, job: int, form: str | None) -> dict[str, Any]:
    return {
        "sop_instance_uid": uid, "job_id": job, "kind": "seg", "form": form, "sop_class_uid": SEG,
        "series_instance_uid": "2.25.1", "study_instance_uid": "1.2", "transfer_syntax_uid": EXPLICIT,
        "path": f"results/{uid}.dcm", "sha256": "e" * 64, "size": 10, "created_at": 8.0,
    }  # fmt: skip


RENAMED = {("instance", "sha256"): "digest"}
ROWS: dict[str, list[dict[str, Any]]] = {
    # a study that is done and promised, one with an open association, one with work in every state
    "series": [_series("1.2.3", "1.2", 1, 50.0), _series("1.3.3", "1.3", 0), _series("1.4.3", "1.4", 1)],
    "instance": [_instance(series, number) for series in ("1.2.3", "1.3.3", "1.4.3") for number in (1, 2)],
    "holding": [{"association_id": "a" * 32, "series_instance_uid": "1.3.3", "node_id": "node"}],
    "job": [
        _job(1, "infer", "done", "1.2.3"),
        _job(2, "deliver", "done", "1.2.3", parent_id=1, peer="PACS"),
        _job(3, "infer", "failed", "1.4.3", reason="refused", detail="Umlaute: äöü"),
        _job(4, "infer", "queued", "1.4.3", ended_at=None, attempts=0, model="mr_brain"),
        _job(5, "infer", "running", "1.4.3", ended_at=None, lease_token="t" * 32, lease_until=60.0, progress=0.5),
    ],
    "result": [_result("2.25.10", 1, "BINARY"), _result("2.25.11", 1, None)],
    "event": [
        {"event_id": 1, "at": 1.0, "name": "series.opened", "study_instance_uid": "1.2",
         "series_instance_uid": "1.2.3", "job_id": None, "fields": {"modality": "CT"}},
        {"event_id": 2, "at": 3.5, "name": "job.queued", "study_instance_uid": "1.4",
         "series_instance_uid": "1.4.3", "job_id": 5, "fields": {"kind": "infer", "seconds": {"load": 0.25}}},
    ],
    "acceptance": [{"peer": "PACS@10.0.0.5:104", "sop_class_uid": SEG, "transfer_syntax_uid": EXPLICIT,
                    "accepted": True, "asked_at": 7.0}],
    "commitment": [{"job_id": 2, "sop_instance_uid": "2.25.10", "transaction_uid": "9.1", "state": "committed",
                    "failure_reason": None, "asked_at": 9.0}],
    "commitment_request": [
        {"request_id": 1, "transaction_uid": "9.2", "calling_ae_title": "SCANNER",
         "references": [[CT, "1.2.3.1"], [CT, "9.9.9"]], "asked_at": 50.0, "attempts": 1, "not_before": 51.0,
         "ended_at": 52.0},
    ],
}  # fmt: skip


def upgrade(url: str, revision: str, *, stamp: str = "") -> None:
    """Bring an empty or earlier database to a revision; `stamp` is what it is then said to be."""
    database = open_database(url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        if stamp:
            connection.execute(text("UPDATE alembic_version SET version_num = :stamp"), {"stamp": stamp})
    database.close()


def fill(url: str, revision: str) -> None:
    """Make the tables of a revision and fill them, each column that it had."""
    upgrade(url, revision)
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for table in tables.sorted_tables:
            # what JSON is in the schema is JSON here: SQLite's reflection knows it, PostgreSQL's too
            for row in ROWS.get(table.name, []):
                connection.execute(table.insert().values({key: row[key] for key in row if key in table.c}))
        if engine.dialect.name == "postgresql":  # what was inserted by number does not move the sequences
            for table, column in (("job", "job_id"), ("event", "event_id"), ("commitment_request", "request_id")):
                if table in tables.tables:
                    sequence = f"pg_get_serial_sequence('{table}', '{column}')"
                    connection.execute(text(f"SELECT setval({sequence}, 100)"))
    engine.dispose()


def everything(url: str, like: dict[str, list[dict[str, Any]]] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return every row of every table, or of the columns that `like` has."""
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    found = {}
    with engine.connect() as connection:
        for name, table in tables.tables.items():
            if name == "alembic_version" or (like is not None and name not in like):
                continue
            keys = like[name][0] if like and like[name] else table.c.keys()
            columns = [table.c[key] if key in table.c else table.c[RENAMED[name, key]].label(key) for key in keys]
            rows = connection.execute(table.select().with_only_columns(*columns)).mappings()
            found[name] = sorted((dict(row) for row in rows), key=str)
    engine.dispose()
    return found


def revision_of(url: str) -> str:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
    engine.dispose()
    return found


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_row_and_value_of_an_earlier_version_survives_and_the_node_goes_on_with_them(either_url, revision):  # noqa: F811
    fill(either_url, revision)
    before = everything(either_url)
    assert all(before[table] for table in before if table in ROWS)

    ledger = Ledger(either_url, migrate=True)

    assert everything(either_url, like=before) == before
    with ledger._database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    goes_on(ledger, is_promised=revision >= "0003")
    ledger.close()


def goes_on(ledger: Ledger, *, is_promised: bool) -> None:
    """What was under way is finished, and new work is done."""
    ledger.require_schema()
    assert ledger.jobs.get(3).detail == "Umlaute: äöü"
    assert len(ledger.jobs.results_of(1)) == 2
    assert ledger.jobs.recover(now=100.0, maximum_deaths=3) == 1
    assert ledger.jobs.get(5).state is State.QUEUED
    assert claim(ledger, 5, now=101.0).series_instance_uid == "1.4.3"
    ledger.arrivals.forget_associations_of("node", now=102.0)
    (open_series,) = ledger.arrivals.open_series()
    assert (open_series.series_instance_uid, open_series.held_open) == ("1.3.3", False)
    (number,) = complete(ledger, "1.3.3", now=103.0)
    assert number > 5
    receive(ledger, 1, "7.7.7", study_instance_uid="7.7", now=104.0)
    (done,) = ledger.departures.studies(["1.2"])
    assert done.promised_at == (50.0 if is_promised else None), "what was asked about counts as promised"
    gone = ledger.departures.delete(
        "1.2", "d", node_id="node", judge=lambda _: Ground.AGE, set_aside=lambda *_: None, now=105.0
    )
    assert gone.sop_classes == {CT: 2, SEG: 2}


DIE = """
import os, sys
from sqlalchemy import Engine, event
@event.listens_for(Engine, "before_cursor_execute")
def die(connection, cursor, statement, *_):
    if sys.argv[2] in " ".join(statement.split()):
        os._exit(9)
from dicom_node.ledger import Ledger
Ledger(sys.argv[1], migrate=True)
"""


@pytest.mark.parametrize("statement", ["CREATE TABLE commitment_request", f"version_num='{REVISIONS[-1]}'"])
def test_a_migration_that_is_killed_in_the_middle_leaves_the_old_version_and_the_next_one_succeeds(
    either_url,  # noqa: F811
    statement,
):
    fill(either_url, REVISIONS[0])
    before = everything(either_url)

    died = subprocess.run([sys.executable, "-c", DIE, either_url, statement], capture_output=True, timeout=120)

    assert died.returncode == 9, died.stderr
    assert revision_of(either_url) == REVISIONS[0]
    assert everything(either_url) == before
    Ledger(either_url, migrate=True).close()
    assert revision_of(either_url) == newest_revision()
    assert everything(either_url, like=before) == before


def require_schema(url: str) -> None:
    ledger = Ledger(url)
    try:
        ledger.require_schema()
    finally:
        ledger.close()


def test_a_ledger_of_a_later_version_is_refused_by_all_and_left_as_it_is(either_url):  # noqa: F811
    upgrade(either_url, "head", stamp="9999")

    with pytest.raises(SettingsError, match="a later version of dicom-node has used this ledger"):
        Ledger(either_url, migrate=True)
    with pytest.raises(SettingsError, match="schema 9999"):
        require_schema(either_url)
    assert revision_of(either_url) == "9999"


@pytest.mark.parametrize("revision", ["", REVISIONS[0], REVISIONS[-2]])
def test_who_comes_before_the_node_has_migrated_is_told_to_wait(either_url, revision):  # noqa: F811
    if revision:
        upgrade(either_url, revision)

    with pytest.raises(LedgerUnavailable, match="its node makes it"):
        require_schema(either_url)

    Ledger(either_url, migrate=True).close()
    require_schema(either_url)


def test_a_worker_waits_for_the_node_to_migrate_and_ends_where_a_later_version_did(tmp_path):
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    (tmp_path / "node.toml").write_text(
        f'[node]\nstorage = "storage"\nledger = "{url}"\nbroker = "redis://127.0.0.1:1"'
    )
    arguments = [sys.executable, "-m", "workers", "--queue", "deliver", "--settings", str(tmp_path / "node.toml")]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as worker:
        said = (tmp_path / "log").read_text
        try:
            for _ in range(600):
                if "worker.waiting" in said():
                    break
                time.sleep(0.1)
            assert "its node makes it, when it starts" in said()
            assert worker.poll() is None
            upgrade(url, "head", stamp="9999")
            assert worker.wait(30) == 2
        finally:
            worker.kill()
    assert "install that version" in said()


def test_the_newest_revision_is_the_end_of_one_line():
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(MIGRATIONS))

    assert scripts.get_heads() == [newest_revision()]
    assert [script.revision for script in scripts.walk_revisions()][::-1] == REVISIONS
