"""The global random generators. Nothing of alignkit draws from them; what a plugin, or a library under it, draws must go on as well."""

from __future__ import annotations

import random

import numpy as np
import torch

from alignkit.interfaces import State


class Generators:
    """Python's, NumPy's and torch's (of the CPU and of each CUDA device), set anew from ``seed``: a stage's draws are its own."""

    def __init__(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def state(self) -> State:
        """Where each of them is."""
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        return State(
            {"torch": torch.get_rng_state(), **{_cuda(i): torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}},
            {"python": [version, list(words), gauss], "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached]},
        )

    def load_state(self, state: State) -> None:
        """Continue from ``state``; a device that was not there then keeps what its seed gave it."""
        version, words, gauss = state.values["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = state.values["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state.tensors["torch"])
        for i in range(torch.cuda.device_count()):
            if _cuda(i) in state.tensors:
                torch.cuda.set_rng_state(state.tensors[_cuda(i)], i)


def _cuda(device: int) -> str:
    return f"cuda.{device}"
