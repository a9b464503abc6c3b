"""What is asked again and again does not read every row: nobody waits longer because the ledger has grown."""

from __future__ import annotations

from sqlalchemy import create_engine, event, text

from bench.filling import fill
from dicom_node.config.tables import JobsTable
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind

FILLED = 3000  # instances, ten series
STUDY, SERIES = "2.25.10000001000000003", "2.25.20000001000000003"


def scanned(ledger: Ledger) -> set[str]:
    """Collect the tables that statements from now on read as a whole; the set fills as they run."""
    found: set[str] = set()

    @event.listens_for(ledger._database.engine, "before_cursor_execute")
    def explain(connection, _cursor, statement, parameters, _context, many):
        if not many and statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
            raw = connection.connection.cursor()
            for *_, step in raw.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall():
                if step.startswith("SCAN") and "INDEX" not in step:
                    found.add(step.split()[1])

    return found


def filled(tmp_path) -> Ledger:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    ledger = Ledger(url, migrate=True)
    fill(url, first=0, last=FILLED)
    return ledger


def test_the_status_counts_no_instances(tmp_path):
    ledger = filled(tmp_path)
    tables = scanned(ledger)
    assert ledger.history.counts()["instances"] == FILLED
    assert len(ledger.history.recent_jobs(limit=5)) == 5
    assert tables & {"instance", "event", "result"} == set()


def test_the_story_of_a_study_or_a_series_is_found_by_index(tmp_path):
    ledger = filled(tmp_path)
    tables = scanned(ledger)
    for uid in (STUDY, SERIES):
        assert len(ledger.history.events_of(uid)) == 8
        assert len(ledger.history.results_of(uid)) == 1
        assert len(ledger.history.jobs_of(uid)) == 2
    assert tables == set()


def test_what_is_due_and_whose_lease_ran_out_is_found_by_index(tmp_path):
    ledger = filled(tmp_path)
    tables = scanned(ledger)
    assert not ledger.queue.needs_attention(now=1.0, hint_again=1.0)
    assert ledger.commitments.next_due() is None
    assert ledger.arrivals.open_series() == []
    assert ledger.jobs.recover(maximum_deaths=3, now=1.0) == 0
    for kind in Kind:
        assert ledger.queue.due(kind, courtesy=JobsTable().courtesy, now=1.0, hint_again=1.0, limit=1) == []
    small = {"holding", "CONSTANT"}  # as many rows as associations are open; none at all
    assert {name for name in tables - small if not name.startswith("anon_")} == set(), "but for what it found itself"


def test_the_events_of_a_series_that_is_gone_are_still_told(tmp_path):
    ledger = filled(tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path / 'ledger.sqlite3'}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE event SET series_instance_uid = '1.2.9' WHERE event_id = 5"))
    assert [each["event_id"] for each in ledger.history.events_of("1.2.9")] == [5]


def test_a_series_knows_how_many_bytes_it_had_before_it_was_counted(tmp_path):
    from alembic import command
    from alembic.config import Config

    from dicom_node.ledger import database

    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    config = Config()
    config.set_main_option("script_location", f"{database.__file__.rpartition('/')[0]}/migrations")
    with create_engine(url).begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        connection.execute(
            text(
                "INSERT INTO series (series_instance_uid, study_instance_uid, modality, calling_ae_title,"
                " is_own_result, revision, complete_revision, received, last_activity, released)"
                " VALUES ('1.2.3', '1.2', 'CT', 'SCANNER', 0, 1, 1, 2, 1.0, 1)"
            )
        )
        for number, size in ((1, 1000), (2, 234)):
            connection.execute(
                text(
                    "INSERT INTO instance (sop_instance_uid, sop_class_uid, series_instance_uid,"
                    " transfer_syntax_uid, number_of_frames, path, sha256, size, received_at)"
                    " VALUES (:uid, '1.2.840', '1.2.3', '1.2.840.10008.1.2.1', 1, :uid, '', :size, 1.0)"
                ),
                {"uid": f"1.2.3.{number}", "size": size},
            )

    again = Ledger(url, migrate=True)

    assert again.history.counts()["bytes"] == 1234
    again.close()
