"""The pages: hand-written files that a browser runs as they are, with nothing to build and nothing to fetch from elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

PAGES = {
    "chat.html": "text/html; charset=utf-8",
    "theme.css": "text/css; charset=utf-8",
    "chat.css": "text/css; charset=utf-8",
    "label.css": "text/css; charset=utf-8",
    "admin.css": "text/css; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "label.js": "text/javascript; charset=utf-8",
}
"""Every file there is, with its media type. ``chat.html`` asks for the others below ``/assets/``."""


@dataclass(frozen=True, slots=True)
class Page:
    """A file as it is sent. ``etag`` changes when the content does."""

    content: bytes
    media_type: str
    etag: str


@cache
def page(name: str) -> Page:
    """One of ``PAGES``, read once. Raises ``KeyError`` for any other name: a name is never a path."""
    media_type = PAGES[name]
    content = files(__package__).joinpath(name).read_bytes()
    return Page(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
