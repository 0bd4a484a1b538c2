"""The databases and the browser, for every test of the server."""

from tests.serve.browsing import browser
from tests.serve.databases import database_url, postgres, store

__all__ = ["browser", "database_url", "postgres", "store"]
