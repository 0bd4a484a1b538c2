"""How alembic reaches the database: on the connection, and in the transaction, that ``migrate`` hands it."""

from alembic import context

from alignkit_serve.store.tables import REVISIONS, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=REVISIONS, render_as_batch=True
)
context.run_migrations()
