"""A ledger that has been in use for long: rows by the million, written by the database itself."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, create_engine, text

SERIES_OF = 300  # instances
_NUMBERS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :last)",
    "postgresql": "WITH n(i) AS (SELECT generate_series(CAST(:first AS bigint), CAST(:last AS bigint) - 1))",
}
_DIGEST = {"sqlite": "lower(hex(randomblob(32)))", "postgresql": "md5(i::text) || md5((-i)::text)"}
_JSON = {"sqlite": "{}", "postgresql": "CAST({} AS json)"}
_AT_ONCE = 1_000_000  # instances in one transaction

_SERIES = """INSERT INTO series (series_instance_uid, study_instance_uid, modality, calling_ae_title, is_own_result,
 revision, complete_revision, received, bytes, last_activity, released)
{numbers} SELECT '2.25.2000000' || (1000000000 + i), '2.25.1000000' || (1000000000 + i), 'CT', 'SCANNER', {false},
 1, 1, {series_of}, {series_of} * 525524, 1.7e9 + i, {true} FROM n"""
_INSTANCES = """INSERT INTO instance (sop_instance_uid, sop_class_uid, series_instance_uid, transfer_syntax_uid,
 number_of_frames, place, path, digest, size, received_at)
{numbers} SELECT '2.25.3000000' || (100000000000 + i), '1.2.840.10008.5.1.4.1.1.2',
 '2.25.2000000' || (1000000000 + i / {series_of}), '1.2.840.10008.1.2.1', 1, {place},
 'studies/2.25.1000000' || (1000000000 + i / {series_of}) || '/2.25.2000000' || (1000000000 + i / {series_of})
 || '/2.25.3000000' || (100000000000 + i) || '.dcm', {digest}, 525524, 1.7e9 + i / {series_of} FROM n"""
_JOBS = """INSERT INTO job (kind, key, state, series_instance_uid, revision, model, routes, send_to, parent_id,
 peer, attempts, not_before, progress, created_at, wanted_since, started_at, ended_at)
{numbers} SELECT '{kind}', '{kind}/' || i, 'done', '2.25.2000000' || (1000000000 + i), 1, 'ct_lung',
 {routes}, {send_to}, {parent}, {peer}, 1, 1.7e9 + i, 1.0, 1.7e9 + i, 1.7e9 + i, 1.7e9 + i, 1.7e9 + i FROM n"""
_RESULTS = """INSERT INTO result (sop_instance_uid, job_id, kind, form, sop_class_uid, series_instance_uid,
 study_instance_uid, transfer_syntax_uid, path, sha256, size, created_at)
{numbers} SELECT '2.25.4000000' || (1000000000 + i), {inference}, 'seg', NULL, '1.2.840.10008.5.1.4.1.1.66.4',
 '2.25.5000000' || (1000000000 + i), '2.25.1000000' || (1000000000 + i), '1.2.840.10008.1.2.1',
 'results/' || i, {digest}, 2000000, 1.7e9 + i FROM n"""
_INFERENCE = "(SELECT job_id FROM job WHERE key = 'infer/' || i)"
_EVENTS = """INSERT INTO event (at, name, study_instance_uid, series_instance_uid, job_id, fields)
{numbers} SELECT 1.7e9 + i / 8, 'job.claimed', '2.25.1000000' || (1000000000 + i / 8),
 '2.25.2000000' || (1000000000 + i / 8), NULL, {fields} FROM n"""


def fill(url: str, *, first: int, last: int) -> None:
    """Add instances `first` to `last` - 1 with their series, two jobs and a result for each, and eight events.

    Every series has SERIES_OF instances, is a study, complete and done with. The schema must be there.
    """
    engine = create_engine(url)
    for start in range(first, last, _AT_ONCE):
        with engine.begin() as connection:
            _fill(connection, start, min(last, start + _AT_ONCE))
    _settle(engine)
    engine.dispose()


def fill_backlog(url: str, *, jobs: int, now: float) -> None:
    """Add series without instances, an inference job queued for each."""
    engine = create_engine(url)
    first = 1 << 24  # series that `fill` never comes to
    with engine.begin() as connection:
        _fill_series(connection, range(first, first + jobs))
        query = f"UPDATE job SET state = 'queued', ended_at = NULL, not_before = {now - 1e5} + job_id * 1e-6"
        where = " WHERE kind = 'infer' AND series_instance_uid >= :first"
        connection.execute(text(query + where), {"first": f"2.25.2000000{1_000_000_000 + first}"})
    _settle(engine)
    engine.dispose()


def _fill(connection: Connection, first: int, last: int) -> None:
    series = range(-(-first // SERIES_OF), -(-last // SERIES_OF))
    _fill_series(connection, series)
    _run(connection, _INSTANCES, range(first, last))


def _fill_series(connection: Connection, series: range) -> None:
    _run(connection, _SERIES, series)
    _run(connection, _JOBS, series, kind="infer", parent="NULL", peer="NULL")
    _run(connection, _JOBS, series, kind="deliver", parent=_INFERENCE, peer="'PACS'")
    _run(connection, _RESULTS, series)
    _run(connection, _EVENTS, range(8 * series.start, 8 * series.stop))


def _run(connection: Connection, statement: str, numbers: range, **values: str) -> None:
    kind = connection.dialect.name
    literal = _JSON[kind].format
    filled = statement.format(
        numbers=_NUMBERS[kind],
        digest=_DIGEST[kind],
        place=literal("'[[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [-100.0, -100.0, ' || (i % 300) || '.0]]'"),
        routes=literal("""'["chest"]'"""),
        send_to=literal("""'["PACS"]'"""),
        fields=literal("'[]'"),
        inference=_INFERENCE,
        series_of=SERIES_OF,
        true="TRUE",
        false="FALSE",
        **values,
    )
    connection.execute(text(filled), {"first": numbers.start, "last": numbers.stop})


def _settle(engine: Engine) -> None:
    """Leave the tables as years would: PostgreSQL analyses them by itself, SQLite never does."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
