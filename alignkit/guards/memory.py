"""Out of memory: how it is told from other errors, and what must be as it was before something is tried again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

_OF_LIBRARIES = ("bad_alloc", "could not create a primitive")
"""What libraries under torch raise on a CPU, where its own allocator has a sentence. oneDNN says no more than the second one; the same
product was made when a run began, so what it lacks is memory.
"""

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | None:
    """What ``work`` returns, or None where memory does not suffice for it. By then nothing holds what it had made: the error is gone, and
    with it the frames of ``work``.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory to give."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or any(sentence in str(error) for sentence in _OF_LIBRARIES)
        or should_reduce_batch_size(error)
    )


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_draws() -> Callable[[], None]:
    """Remember where torch's generators are; what is returned puts them back, so that the same is drawn again."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def again() -> None:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return again
