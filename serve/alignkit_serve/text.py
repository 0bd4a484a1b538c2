"""From tokens to text that can be shown at once: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from alignkit_serve.engine import Finish, Piece, Token

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The text of one answer as its tokens come.

    The answer ends where a stop string is complete for the first time, whatever the tokens or pieces it came in; of two that are complete
    at the same character, the longer one is cut off.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._ids: list[int] = []
        self._text = ""  # all of it
        self._shown = 0  # characters of it that were handed out
        self._held: list[tuple[int, Token]] = []  # tokens that were not, and where the text of each begins

    def take(self, token: Token, finished: Finish | None) -> Piece:
        """What can be shown after one more token. ``finished``: "stop" means that it is a stop token, which has no text."""
        assert token.id is not None
        begin = len(self._text)
        if finished != "stop":
            self._held.append((begin, token))
            self._ids.append(token.id)
            self._text += self._decoder.step(self._tokenizer.backend_tokenizer, token.id) or ""
        if finished:
            self._text = self._whole()
        if (cut := _first_stop(self._text, self._stop, begin)) is not None:
            self._text, finished = self._text[:cut], "stop"
        end = len(self._text) if finished else len(self._text) - _begun(self._text, self._stop)
        text, self._shown = self._text[self._shown : end], max(end, self._shown)
        return Piece(text, self._release(all_of_them=finished is not None and cut is None), (token,), finished)

    def _whole(self) -> str:
        """All of the text, with what was held back because a character was incomplete."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return whole if whole.startswith(self._text) else self._text

    def _release(self, *, all_of_them: bool) -> tuple[Token, ...]:
        """The tokens of which some text has been shown, once each."""
        count = len(self._held) if all_of_them else sum(begin < self._shown for begin, _ in self._held)
        released, self._held = self._held[:count], self._held[count:]
        return tuple(token for _, token in released)


def _first_stop(text: str, stop: Sequence[str], begin: int) -> int | None:
    """Where the stop string begins that is complete first, if one is. Those before ``begin`` would have been found before."""
    ends = []
    for one in stop:
        start = text.find(one, max(0, begin - len(one) + 1))
        if start >= 0:
            ends.append((start + len(one), start))
    return min(ends)[1] if ends else None


def _begun(text: str, stop: Sequence[str]) -> int:
    """The length of the longest end of ``text`` with which a stop string begins."""
    longest = max((len(one) for one in stop), default=0)
    return next((n for n in range(min(longest - 1, len(text)), 0, -1) if any(one.startswith(text[-n:]) for one in stop)), 0)


class TokenBytes:
    """The bytes that a token stands for, alone it may be part of a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Byte-level tokenizers write each byte as one printable character; which, is a table that all of them share.
        self._alphabet = _byte_alphabet() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None

    def __call__(self, token: int) -> bytes:
        """The bytes of one token id."""
        text: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if text is None:
            return b""  # a row of the head beyond the vocabulary
        if self._alphabet is not None and all(letter in self._alphabet for letter in text):
            return bytes(self._alphabet[letter] for letter in text)
        if match := _BYTE.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode(errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """Printable characters stand for themselves, the others for the next free ones from 256 on (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
