"""Plain text beside what a stage learns from: an order of its own, cut to chunks, every token trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.data.order import Order
from alignkit.data.records import documents
from alignkit.errors import DataError
from alignkit.interfaces import Codec, DataSource, State
from alignkit.settings import Component
from alignkit.types import Document, TokenRow

if TYPE_CHECKING:
    from alignkit.context import Context


def encode_documents(codec: Codec, records: Sequence[Document], *, max_length: int) -> tuple[TokenRow, ...]:
    """Chunks of at most ``max_length`` tokens, every token trained but a chunk's first, which nothing precedes.

    No stop token is put behind a text: a pretraining text is not a turn, and a chunk that was cut has no end. What remains of a text as
    a single token is left out.
    """
    chunks = []
    for record in records:
        ids = codec.text(record.text)
        for number, start in enumerate(range(0, len(ids), max_length), start=1):
            part = ids[start : start + max_length]
            name = record.id if number == 1 else f"{record.id}#{number}"
            if len(part) > 1:
                chunks.append(TokenRow(name, part, (False, *(True,) * (len(part) - 1))))
    return tuple(chunks)


class PretrainingStream:
    """Chunks of a data source of ``text`` rows, each once an epoch; ``name`` sets its order apart from every other of the run."""

    def __init__(self, context: Context, data: Component[DataSource], codec: Codec, *, max_length: int, name: str) -> None:
        rows: list[Any] = list(context.build_data(data).rows())
        self._chunks = encode_documents(codec, documents(rows), max_length=max_length)
        if not self._chunks:
            raise DataError(f"{name}: none of the {len(rows)} texts has two tokens or more, so there is nothing to predict")
        self._order = Order(len(self._chunks), context.seed, name)

    def take(self, count: int) -> list[TokenRow]:
        """The next ``count`` chunks."""
        return [self._chunks[i] for i in self._order.take(count)]

    def state(self) -> State:
        """Where it is in its order."""
        return self._order.state()

    def load_state(self, state: State) -> None:
        """Continue from ``state``."""
        self._order.load_state(state)
