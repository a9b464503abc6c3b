"""One engine for SQLite and PostgreSQL: how it is opened, migrated, and what a transaction is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, func, inspect, make_url, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, OperationalError, SQLAlchemyError

from dicom_node.errors import LedgerRefused, LedgerUnavailable, SettingsError

_BUSY_TIMEOUT = 15.0  # seconds that a writer waits for another before the ledger counts as unavailable
_MIGRATIONS = Path(__file__).parent / "migrations"
_ROWS = 256  # inserted by one statement
_MIGRATION_LOCK = 0x6469636F6D  # "dicom"

Row = tuple[object, ...]


class Database:
    """The only door to the tables: transactions that write, connections that read."""

    def __init__(self, engine: Engine) -> None:
        """Wrap `engine`; use `open_database` to make one."""
        self.engine = engine
        self._dialect: Any = postgresql if engine.dialect.name == "postgresql" else sqlite
        self._mark = "%s" if self._dialect is postgresql else "?"

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Run one transaction.

        Raises LedgerUnavailable where the database does not answer or is locked, LedgerRefused where it never takes
        what it was given.
        """
        with _availability(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that only reads and locks nothing."""
        with _availability(), self.engine.connect() as raw:
            yield raw.execution_options(isolation_level="AUTOCOMMIT")

    def require_schema(self) -> None:
        """Raise where the tables are not those that this program knows.

        Raises LedgerUnavailable where the node that brings them there has not been started yet, SettingsError where a
        later version of the program has changed them.
        """
        with self.reading() as connection:
            found = _revision(connection)
        if found > newest_revision():
            raise _too_new(found)
        if found < newest_revision():
            raise LedgerUnavailable(
                f"The ledger has schema {found or 'none'}, this version needs {newest_revision()}: its node makes it, "
                "when it starts"
            )

    def insert(self, table: Table) -> Any:
        """Return an INSERT that knows ON CONFLICT, in this database's dialect."""
        return self._dialect.insert(table)

    def insert_rows(self, connection: Connection, table: Table, names: Sequence[str], rows: Sequence[Row]) -> None:
        """Insert many rows by few statements, values of the columns `names` as the driver takes them.

        Drivers take the rows of one statement for each, and SQLAlchemy looks at every value before: for the instances
        of a series that is a fifth of the time that they cost the ledger.
        """
        values = f"({', '.join([self._mark] * len(names))})"
        for at in range(0, len(rows), _ROWS):
            some = rows[at : at + _ROWS]
            statement = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES {', '.join([values] * len(some))}"  # noqa: S608
            connection.exec_driver_sql(statement, tuple(chain.from_iterable(some)))

    def unused_number(self, *numbers: Any) -> dict[str, Any]:
        """Return the value for an identity column, by its name, that none of these columns has ever had.

        Empty where the database sees to that itself: SQLite gives the number of a last row again that was deleted.
        """
        if self._dialect is postgresql:
            return {}
        highest = [func.coalesce(select(func.max(each)).scalar_subquery(), 0) for each in numbers]
        return {numbers[0].name: func.max(*highest) + 1}

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


@contextmanager
def _availability() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise LedgerRefused(f"The ledger cannot hold it: {type(error.orig).__name__}") from None
    except DBAPIError as error:
        # the statement and its parameters stay out of the message: they may be logged
        raise LedgerUnavailable(f"The ledger does not answer: {_reason(error)}") from error
    except SQLAlchemyError as error:
        raise LedgerUnavailable(f"The ledger does not answer: {type(error).__name__}") from error


def _reason(error: DBAPIError) -> str:
    """Return why; where there was no connection, in the words of the database: none of them is from an image."""
    is_from_server = isinstance(error, OperationalError) and type(error.orig).__module__.startswith("psycopg")
    if error.statement is not None or not is_from_server:
        return type(error.orig).__name__
    told = " ".join(str(error.orig).rpartition(" failed: ")[2].split())
    return f"node.ledger: {told[:200]}"


def open_database(url: str, *, migrate: bool = False) -> Database:
    """Open the ledger at a SQLAlchemy `url`; with `migrate`, bring its schema to this version first."""
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        raise SettingsError("node.ledger: not a SQLAlchemy URL such as postgresql+psycopg://user@host/name") from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")  # the driver that is installed with the node
    try:
        engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _server(parsed)
    except (SQLAlchemyError, ImportError) as error:
        raise SettingsError(f"node.ledger: no driver for {parsed.drivername!r} (use postgresql+psycopg)") from error
    database = Database(engine)
    if migrate:
        try:
            _migrate(database)
        except BaseException:
            database.close()
            raise
    return database


def _sqlite(url: Any) -> Engine:
    if not url.database or url.database == ":memory:":
        raise SettingsError("node.ledger: SQLite needs a file, sqlite:////path/to/ledger.sqlite3")
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerUnavailable(f"The ledger's folder cannot be made: {error.strerror}") from error
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")  # a commit is on the disk, not on its way
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # a transaction that reads and then writes must take the write lock at once, or two of them deadlock
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _server(url: Any) -> Engine:
    return create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=50, connect_args={"connect_timeout": 5})


def newest_revision() -> str:
    """Return the revision of the schema that this program knows."""
    return max(path.name[:4] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def _revision(connection: Connection) -> str:
    """Return the revision of the tables; empty where there are none."""
    if not inspect(connection).has_table("alembic_version"):
        return ""
    return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or "")


def _too_new(found: str) -> SettingsError:
    return SettingsError(
        f"node.ledger: a later version of dicom-node has used this ledger (schema {found}, this version knows "
        f"{newest_revision()}): install that version, or restore the backup from before"
    )


def _migrate(database: Database) -> None:
    """Bring the tables to this version, whole or not at all."""
    with database.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        if (found := _revision(connection)) > newest_revision():
            raise _too_new(found)
        if found < newest_revision():
            _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    from alembic import command  # only the first start of a version needs it
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
