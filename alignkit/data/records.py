"""Rows to records, in the forms that users of other trainers already have. Every mistake names its row."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.data.sources import shown
from alignkit.errors import DataError
from alignkit.interfaces import Row
from alignkit.types import Demonstration, Document, Message, Prompt, Ranking

ROLES = ("system", "user", "assistant", "tool")

# The columns that each form reads; a prompt's metadata holds the others.
_DEMONSTRATION = frozenset({"id", "prompt", "completion", "messages"})
_RANKING = frozenset({"id", "prompt", "chosen", "rejected", "responses", "ranks", "labeler", "weight", "margin", "preference"})
_PROMPT = frozenset({"id", "prompt", "messages"})


def demonstrations(rows: Sequence[Row]) -> list[Demonstration]:
    """``prompt`` + ``completion`` (plain or conversational), or ``messages`` (every assistant turn is trained)."""
    found, names = [], _Names()
    for row in rows:
        if row.values.get("messages") is not None:
            messages = _messages(row, "messages", row.values["messages"])
            first = next((i for i, message in enumerate(messages) if message.role == "assistant"), None)
            if first is None:
                raise _error(row, "messages has no assistant turn, so there is nothing to learn")
            prompt = _prompt(row, messages[:first], plain=False, names=names, read=_DEMONSTRATION)
            found.append(Demonstration(prompt, messages[first:]))
            continue
        _need(row, ("prompt", "completion"), ("messages",))
        messages, plain = _text_or_messages(row, "prompt")
        completion, plain_completion = _text_or_messages(row, "completion", role="assistant")
        if plain != plain_completion:
            raise _error(row, "prompt and completion must be of one form: both text, or both lists of messages")
        if completion[-1].role != "assistant":
            raise _error(row, f'completion ends with a turn of "{completion[-1].role}"; its last turn must be the assistant\'s')
        found.append(Demonstration(_prompt(row, messages, plain=plain, names=names, read=_DEMONSTRATION), completion))
    return found


def rankings(rows: Sequence[Row]) -> list[Ranking]:
    """``prompt`` + ``responses`` + ``ranks``, or ``prompt`` + ``chosen`` + ``rejected``; a prompt may be inside chosen and rejected."""
    found, names = [], _Names()
    for row in rows:
        if row.values.get("responses") is not None:
            _need(row, ("prompt", "responses", "ranks"))
            messages, plain = _text_or_messages(row, "prompt")
            responses = _responses(row, plain=plain)
            ranks = _ranks(row, len(responses))
        else:
            _need(row, ("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "responses", "ranks"))
            messages, plain, responses = _comparison(row)
            ranks = (1, 2)
        labeler = row.values.get("labeler")
        found.append(
            Ranking(
                prompt=_prompt(row, messages, plain=plain, names=names, read=_RANKING),
                responses=responses,
                ranks=ranks,
                labeler=None if labeler is None else str(labeler),
                weight=_number(row, "weight", 1.0, low=0.0),
                margin=_number(row, "margin", 0.0, low=0.0),
                preference=_preference(row, len(responses)),
            )
        )
    return found


def prompts(rows: Sequence[Row]) -> list[Prompt]:
    """``prompt`` (text to be continued, or messages), or ``messages`` that end with the turn to be answered."""
    found, names = [], _Names()
    for row in rows:
        _need(row, ("prompt",), ("messages",))
        messages, plain = _text_or_messages(row, "prompt" if row.values.get("prompt") is not None else "messages")
        found.append(_prompt(row, messages, plain=plain, names=names, read=_PROMPT))
    return found


def documents(rows: Sequence[Row]) -> list[Document]:
    """``text``, for pretraining: all of it is trained."""
    found, names = [], _Names()
    for row in rows:
        _need(row, ("text",))
        text = row.values["text"]
        if not isinstance(text, str) or not text.strip():
            raise _error(row, f"text is {_quoted(text)}; allowed: text that is not empty")
        found.append(Document(names.of(row, (Message("text", text),)), text, origin=row.origin))
    return found


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 of the rows' values, in order; a key whose value is null is not there, so the same rows agree in every kind of file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(_present(row.values)) + b"\n")
    return digest.hexdigest()


class _Names:
    """Ids: a row's own, or one that follows from its prompt and from how often that came before."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}
        self._repeats: dict[str, int] = {}

    def of(self, row: Row, messages: Sequence[Message]) -> str:
        own = row.values.get("id")
        name = self._made(messages) if own is None else str(own)
        if name in self._taken:
            raise _error(row, f"the id {name!r} is taken by {self._taken[name]}; ids must be unique, or left out")
        self._taken[name] = row.origin
        return name

    def _made(self, messages: Sequence[Message]) -> str:
        key = hashlib.sha256(_canonical([[m.role, m.content] for m in messages])).hexdigest()[:16]
        while True:
            self._repeats[key] = self._repeats.get(key, 0) + 1
            name = key if self._repeats[key] == 1 else f"{key}-{self._repeats[key]}"
            # Another row may have this id for its own: ids that were made here once come back in files.
            if name not in self._taken:
                return name


def _prompt(row: Row, messages: tuple[Message, ...], *, plain: bool, names: _Names, read: frozenset[str]) -> Prompt:
    if not messages:
        raise _error(row, "the conversation begins with an assistant turn; a response needs something to answer")
    if messages[-1].role == "assistant":
        raise _error(row, "the prompt ends with an assistant turn; it must end with the turn to be answered, the answer is no part of it")
    metadata = {key: value for key, value in _present(row.values).items() if key not in read}
    return Prompt(names.of(row, messages), messages, plain=plain, metadata=metadata, origin=row.origin)


def _comparison(row: Row) -> tuple[tuple[Message, ...], bool, tuple[str, ...]]:
    """The prompt, whether it is plain text, and the two answers, the better one first."""
    chosen, plain = _text_or_messages(row, "chosen", role="assistant")
    rejected, plain_rejected = _text_or_messages(row, "rejected", role="assistant")
    if plain != plain_rejected:
        raise _error(row, "chosen and rejected must be of one form: both text, or both lists of messages")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise _error(row, f'{name} ends with a turn of "{turns[-1].role}"; its last turn must be the assistant\'s')
    before, answers = chosen[:-1], (chosen[-1].content, rejected[-1].content)
    if before != rejected[:-1]:
        raise _error(row, "chosen and rejected must be the same conversation up to their last turn, which is compared")
    if row.values.get("prompt") is None:
        if not before:
            raise _error(row, "without a prompt, chosen and rejected must be whole conversations, lists of messages that begin with it")
        return before, False, answers
    messages, plain_prompt = _text_or_messages(row, "prompt")
    if before:
        # Whole conversations beside the prompt that they hold already, as some published data sets have them.
        held = any(turn.content == messages[0].content for turn in before) if plain_prompt else messages == before
        if not held:
            raise _error(row, "chosen and rejected are whole conversations, and the prompt beside them is not in them")
        return before, False, answers
    if plain_prompt != plain:
        raise _error(row, "prompt, chosen and rejected must be of one form: all text, or all lists of messages")
    return messages, plain, answers


def _responses(row: Row, *, plain: bool) -> tuple[str, ...]:
    found = row.values["responses"]
    if not isinstance(found, list):
        raise _error(row, f"responses is {_quoted(found)}; allowed: a list of 2 to 9 texts")
    if not 2 <= len(found) <= 9:
        raise _error(row, f"responses has {len(found)} entries; allowed: 2 to 9")
    return tuple(_response(row, f"response {i}", response, plain=plain) for i, response in enumerate(found, start=1))


def _response(row: Row, name: str, found: Any, *, plain: bool) -> str:
    """Text; beside a prompt of messages, also a list with the assistant's one turn."""
    if isinstance(found, list) and not plain:
        turns = _messages(row, name, found)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise _error(row, f"{name} is {_quoted(found)}; allowed: text, or one assistant turn")
        return turns[0].content
    if not isinstance(found, str) or not found.strip():
        raise _error(row, f"{name} is {_quoted(found)}; allowed: text that is not empty")
    return found


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    found = row.values["ranks"]
    whole = isinstance(found, list) and all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in found)
    if not whole:
        raise _error(row, f"ranks is {_quoted(found)}; allowed: a list of whole numbers, 1 is best, equal numbers are ties")
    if len(found) != count:
        raise _error(row, f"there are {len(found)} ranks for {count} responses; one each is needed")
    return tuple(found)


def _preference(row: Row, count: int) -> float | None:
    if row.values.get("preference") is None:
        return None
    if count != 2:
        raise _error(row, f"preference is given with {count} responses; a soft label is for two")
    if row.values.get("margin"):
        raise _error(row, "margin and preference are given together; a margin is for a certain verdict, a soft label for an uncertain one")
    return _number(row, "preference", 1.0, low=0.0, high=1.0)


def _number(row: Row, name: str, default: float, *, low: float, high: float = math.inf) -> float:
    found = row.values.get(name)
    if found is None:
        return default
    # The largest float bounds whole numbers too, which JSON has in any size.
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not low <= found <= min(high, sys.float_info.max):
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise _error(row, f"{name} is {_quoted(found)}; allowed: a number {bounds}")
    return float(found)


def _text_or_messages(row: Row, name: str, role: str = "user") -> tuple[tuple[Message, ...], bool]:
    """The column as messages, and whether it was plain text."""
    found = row.values[name]
    if isinstance(found, str):
        if not found.strip():
            raise _error(row, f"{name} is empty")
        return (Message(role, found),), True
    return _messages(row, name, found), False


def _messages(row: Row, name: str, found: Any) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise _error(row, f'{name} is {_quoted(found)}; allowed: text, or a list of {{"role": ..., "content": ...}}')
    messages = []
    for i, turn in enumerate(found):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise _error(row, f'turn {i + 1} of {name} is {_quoted(turn)}; allowed: {{"role": ..., "content": text}}')
        if turn.get("role") not in ROLES:
            raise _error(row, f"turn {i + 1} of {name} has role {_quoted(turn.get('role'))}; allowed: {', '.join(ROLES)}")
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise _error(row, f"turn {i + 1} of {name} is an empty answer")
        messages.append(Message(turn["role"], turn["content"]))
    return tuple(messages)


def _need(row: Row, *forms: tuple[str, ...]) -> None:
    if any(all(row.values.get(name) is not None for name in form) for form in forms):
        return
    accepted = "; or ".join(" + ".join(form) for form in forms)
    null = [name for form in forms for name in form if name in row.values and row.values[name] is None]
    found = ", ".join(row.values) or "none"
    raise _error(row, f"the columns are {found}{f' ({null[0]} is null)' if null else ''}; needed: {accepted}")


def _error(row: Row, what: str) -> DataError:
    return DataError(f"{row.origin}: {what}; the row is {_quoted(row.values)}")


def _quoted(value: Any) -> str:
    return shown(json.dumps(value, ensure_ascii=False, default=str))


def _present(value: Any) -> Any:
    """Without keys that hold null: a table has every column in every row, also those that only other rows fill."""
    if isinstance(value, Mapping):
        return {key: _present(held) for key, held in value.items() if held is not None}
    return [_present(held) for held in value] if isinstance(value, list) else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
