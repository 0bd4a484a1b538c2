"""Brings a database to the tables that this version knows, in one transaction: a kill in the middle leaves it as it was."""

from __future__ import annotations

import threading

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from alignkit_serve.store.errors import StoreError
from alignkit_serve.store.tables import REVISIONS

# alembic keeps the migration that runs in global variables: one at a time in a process. Between processes the transaction's lock does it.
_ONE_AT_A_TIME = threading.Lock()


def migrate(engine: Engine, name: str) -> None:
    """Upgrade the database called ``name`` to the newest revision. Raises ``StoreError`` for one that a newer version made."""
    config = Config()
    config.set_main_option("script_location", "alignkit_serve.store:migrations")
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    with _ONE_AT_A_TIME, engine.begin() as connection:
        found = MigrationContext.configure(connection, opts={"version_table": REVISIONS}).get_current_revision()
        if found is not None and found not in known:
            raise StoreError(
                f"{name} was written by a newer alignkit: its tables have revision {found}, and this one knows them up to {known[0]}; "
                "upgrade alignkit, or name another database"
            )
        if found != known[0]:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        # SQLite begins even where it may only read: now it is found out, and not with the first answer that somebody waits for.
        connection.exec_driver_sql(f"UPDATE {REVISIONS} SET version_num = version_num")
