"""Property tests take the same examples each time, however busy the machine is, and leave no files behind."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
