"""HTTP as uvicorn speaks it with httptools, which by itself would keep a request's head however long it becomes."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 << 10
"""What may still come of a request's head after the piece in which it began."""


class Protocol(HttpToolsProtocol):
    """Answers 400 to a head that does not end."""

    _in_head = False
    _head = 0

    def data_received(self, data: bytes) -> None:
        """A piece of what the client sends."""
        waited = self._in_head
        super().data_received(data)
        self._head = self._head + len(data) if waited and self._in_head else 0
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head is longer than {HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        """Its first byte was read."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """The empty line was read."""
        super().on_headers_complete()
        self._in_head = False
