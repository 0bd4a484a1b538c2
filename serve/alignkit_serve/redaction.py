"""What identifies people by its form alone is replaced before a text is stored: addresses, numbers of phones, accounts and cards.

Names, streets and stories have no form, and stay. One pass finds all: a match begins and ends where words do, so that what is left beside
a label is in no match of its own, and redacting twice is redacting once. Every pattern is bounded: the time is linear in the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from alignkit_serve.store.feedback import Opinion

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}(?!\w)"
_GAP = r"(?:[ \u00a0]?/[ \u00a0]?|[ \u00a0.-])?"

_PATTERNS: Mapping[str, tuple[str, str]] = {
    # What may not stand before it, and what it is. An end needs no more than that no letter follows.
    "email": (r"(?<!\w)", r"\w[\w.%+-]{0,63}@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{0,61}\w"),
    # International only: what else is a phone number depends on the country, and many a number is none. 00 with gaps, + without or with.
    "phone": (
        r"(?<![\w.])",
        rf"(?:\+|00(?=[1-9][0-9]{{0,2}}[ \u00a0./(-]))[1-9][0-9]{{0,2}}{_GAP}(?:\([0-9]{{1,5}}\){_GAP})?[0-9](?:{_GAP}[0-9]){{6,11}}(?!\w)",
    ),
    "iban": (r"(?<!\w)", r"[A-Za-z]{2}[0-9]{2}(?:[ \u00a0-]?[A-Za-z0-9]){11,30}"),
    "card": (r"(?<![\w.])", r"[2-6](?:[ \u00a0-]?[0-9]){12,18}"),
    "ipv4": (r"(?<![\w.])", _IPV4),
    "ipv6": (r"(?<![\w:])", rf"(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_IPV4}|[0-9A-Fa-f]{{1,4}})(?![\w:])"),
}

_ANYWHERE = re.compile("|".join(f"{before}(?P<{kind}>{form})" for kind, (before, form) in _PATTERNS.items()))
_HERE = re.compile("|".join(f"(?P<{kind}>{form})" for kind, (_, form) in _PATTERNS.items()))

_IBANS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22
GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27
MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29
VA22 VG24 XK20 YE30
"""
_IBAN_LENGTHS = {each[:2]: int(each[2:]) for each in _IBANS.split()}
"""Characters of an account number, by its country."""

Redact = Callable[[str], str]
"""What becomes of a text before it is stored."""


def unchanged(text: str) -> str:
    """Nothing."""
    return text


def redacted(text: str) -> str:
    """``text`` with ``[email]``, ``[phone]``, ``[iban]``, ``[card]`` and ``[ip]`` in place of what is one."""
    kept: list[str] = []
    done = at = 0
    while True:
        # What follows a label at once stands at the beginning of a word: a label is none.
        found = (_HERE.match(text, at) if at and at == done else None) or _ANYWHERE.search(text, at)
        if found is None:
            return "".join([*kept, text[done:]])
        kind, start = str(found.lastgroup), found.start()
        end = _ENDS[kind](text, found) if kind in _ENDS else found.end()
        if end is None:
            at = start + 1
        else:
            kept += [text[done:start], f"[{_LABELS.get(kind, kind)}]"]
            done = at = end


def kept_of(opinion: Opinion, redact: Redact) -> Opinion:
    """An opinion as it is stored: its texts redacted."""
    texts = opinion.kind in ("correction", "demonstration", "comment")
    if not texts and opinion.rationale is None:
        return opinion
    return replace(
        opinion,
        value=redact(opinion.value) if texts else opinion.value,
        rationale=None if opinion.rationale is None else redact(opinion.rationale),
    )


def _iban(text: str, found: re.Match[str]) -> int | None:
    """Where the account number that begins here ends; None: there is none (ISO 13616)."""
    ends = [at + 1 for at in range(found.start(), found.end()) if text[at].isalnum()]
    length = _IBAN_LENGTHS.get(found[0][:2].upper(), 0)
    if not 0 < length <= len(ends) or _goes_on(text, ends[length - 1]):
        return None
    end = ends[length - 1]
    letters = [letter for letter in text[found.start() : end] if letter.isalnum()]
    return end if int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])) % 97 == 1 else None


def _card(text: str, found: re.Match[str]) -> int | None:
    """Where the longest card number that begins here ends; None: there is none (ISO/IEC 7812, Luhn's digit)."""
    ends = [at + 1 for at in range(found.start(), found.end()) if text[at].isdigit()]
    for end in (end for end in reversed(ends[12:]) if not _goes_on(text, end)):
        digits = [int(digit) for digit in text[found.start() : end] if digit.isdigit()]
        doubled = sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
        if (doubled + sum(digits[::-2])) % 10 == 0:
            return end
    return None


def _ipv6(text: str, found: re.Match[str]) -> int | None:
    """The end of what is an address; None: it is a time, or names within names of a program."""
    if not any(letter.isdigit() for letter in found[0]):
        return None
    try:
        ipaddress.IPv6Address(found[0])
    except ValueError:
        return None
    return found.end()


def _goes_on(text: str, end: int) -> bool:
    return end < len(text) and (text[end].isalnum() or text[end] == "_")


_ENDS: Mapping[str, Callable[[str, re.Match[str]], int | None]] = {"iban": _iban, "card": _card, "ipv6": _ipv6}
"""What a form does not tell of them."""

_LABELS = {"ipv4": "ip", "ipv6": "ip"}
