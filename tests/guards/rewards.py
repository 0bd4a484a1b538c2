"""Reward functions that go wrong in one way each, for runs that are to be guarded from them."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from alignkit.types import Sample, Score


def length(samples: Sequence[Sample]) -> list[float]:
    """What a reward model may learn from people who like thorough answers."""
    return [float(len(sample.response)) for sample in samples]


def constant(samples: Sequence[Sample]) -> list[float]:
    return [1.0] * len(samples)


def repetition(samples: Sequence[Sample]) -> list[float]:
    """Tokens that are the same as the one before."""
    return [float(sum(a == b for a, b in zip(sample.response, sample.response[1:], strict=False))) for sample in samples]


def brevity(samples: Sequence[Sample]) -> list[float]:
    return [-float(len(sample.response)) for sample in samples]


def explosive(samples: Sequence[Sample]) -> list[float]:
    """Rewards whose square is infinite in float32, for prompts that are marked; at a prompt that says so, Ctrl-C is pressed once."""
    for sample in samples:
        if sample.prompt.metadata["stop"] and (flag := Path(os.environ["ALIGNKIT_TEST_FLAG"])).exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGINT)
    return [1e30 if sample.prompt.metadata["bad"] else float(len(set(sample.response))) for sample in samples]


def sometimes_nothing(samples: Sequence[Sample]) -> list[Score]:
    """No number for prompts that are marked."""
    return [Score(float("nan") if sample.prompt.metadata["bad"] else float(len(set(sample.response)))) for sample in samples]
