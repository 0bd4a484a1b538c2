"""Pages that are written anew for each reader. Whatever anybody said becomes text: every value is escaped, and no template turns it off."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_HEADERS = {
    "Cache-Control": "no-store",
    # With the envelope's no-referrer a browser would not say of a form where it comes from.
    "Referrer-Policy": "same-origin",
}

_FORMAT = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
_UNSEEN = set("\u034f\u115f\u1160\u2800\u3164\uffa0") | {chr(code) for code in range(0xE0100, 0xE01F0)}
_KEPT = set("\n\t\u200c\u200d")
"""Line ends, and joiners, without which emoji and Persian are spelt wrong."""


def render(template: str, **values: Any) -> str:
    """The page that a template of ``templates/`` makes of the values; it must be given all that it names."""
    return _environment().get_template(template).render(values)


def headers() -> dict[str, str]:
    """What is sent with such a page: nobody keeps it, and its forms say where they come from."""
    return dict(_HEADERS)


def pieces(text: str) -> list[tuple[str, str]]:
    """Text as it can be shown: each piece, and the name of what it is if that draws nothing, turns text around, or is no character."""
    shown: list[tuple[str, str]] = []
    for hidden, run in groupby(text.replace("\r\n", "\n"), _is_hidden):
        if hidden:
            shown += [(f"U+{ord(each):04X}", unicodedata.name(each, "control character").lower()) for each in run]
        else:
            shown.append(("".join(run), ""))
    return shown


def _is_hidden(character: str) -> bool:
    return character not in _KEPT and (unicodedata.category(character) in _FORMAT or character in _UNSEEN)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("alignkit_serve.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["pieces"] = pieces
    return found
