"""The order in which rows are visited: a cursor over permutations that are pure functions of seed, name and epoch."""

from __future__ import annotations

import hashlib

import numpy as np

from alignkit.errors import DataError
from alignkit.interfaces import State


class Order:
    """Indices of ``size`` rows, each once an epoch, in a fresh permutation every epoch."""

    def __init__(self, size: int, seed: int, name: str) -> None:
        if size < 1:
            raise DataError(f"{name}: there are no rows")
        self._size, self._seed, self._name = size, seed, name
        self._epoch = self._cursor = 0
        self.last: list[int] = []  # what was taken last
        self._permutation = self._permuted()

    def take(self, count: int) -> list[int]:
        """The next ``count`` indices, running over the end of an epoch into the next one."""
        taken: list[int] = []
        while len(taken) < count:
            part = self._permutation[self._cursor : self._cursor + count - len(taken)]
            taken += part
            self._cursor += len(part)
            if self._cursor == self._size:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._permutation = self._permuted()
        self.last = taken
        return taken

    def _permuted(self) -> list[int]:
        digest = hashlib.blake2b(f"{self._seed}/{self._name}/{self._epoch}".encode(), digest_size=16).digest()
        order: list[int] = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little"))).permutation(self._size).tolist()
        return order

    def state(self) -> State:
        """Epoch and cursor; the permutation follows from them and from the number of rows."""
        return State(values={"epoch": self._epoch, "cursor": self._cursor, "rows": self._size})

    def load_state(self, state: State) -> None:
        """Continue from ``state``. With another number of rows, whose order is another one, the epoch begins anew.

        A run refuses other rows than it began with (``alignkit.world``), so that this happens to those who have accepted it.
        """
        same = state.values["rows"] == self._size
        self._epoch, self._cursor = state.values["epoch"], state.values["cursor"] if same else 0
        self._permutation = self._permuted()
