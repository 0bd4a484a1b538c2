"""The databases, for every test of the server."""

from tests.serve.databases import database_url, postgres, store

__all__ = ["database_url", "postgres", "store"]
