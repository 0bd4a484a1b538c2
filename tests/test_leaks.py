"""Two hundred iterations hold no more than twenty."""

import gc
import resource
from dataclasses import replace
from pathlib import Path

import torch

from tests.invariants.test_ppo import UNCLIPPED, make, scored

CONFIG = replace(UNCLIPPED, iterations=200, max_new_tokens=4, minibatches=1)


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_nothing_is_kept_from_one_iteration_to_the_next(tmp_path: Path) -> None:
    ppo = make(tmp_path, "llama", CONFIG)
    held, peak = 0, 0
    for step in range(200):
        ppo.update(scored(ppo, CONFIG, step=step))
        if step == 19:
            held, peak = tensors(), peak_bytes()
    assert tensors() == held
    assert peak_bytes() - peak < 32e6  # a batch's logits alone would be more, if 180 of them were kept
