"""Where the server keeps what it served: one database, SQLite or PostgreSQL, that loses nothing it has acknowledged.

``Store`` opens, reads and writes; the modules beside it hold the functions of a connection, one file a subject.
"""

from alignkit_serve.store.errors import StoreError, StoreUnavailable
from alignkit_serve.store.ids import new_id
from alignkit_serve.store.store import Store

__all__ = ["Store", "StoreError", "StoreUnavailable", "new_id"]
