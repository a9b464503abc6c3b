"""Alembic's entry: runs the migrations on the connection that `database.open_database` hands over."""

from alembic import context

from dicom_node.ledger.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
