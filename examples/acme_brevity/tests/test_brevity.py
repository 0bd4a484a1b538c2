"""The conformance kit's tests, and the sums that are this plugin's own."""

from __future__ import annotations

from acme_brevity import Brevity, BrevityConfig, register_rewards

from alignkit.api import Message, Prompt, Sample
from alignkit.testing import RewardSourceConformance


class TestConformance(RewardSourceConformance):
    """Inherits every test of alignkit's kit."""

    spec = register_rewards()[0]
    config = BrevityConfig(target_words=3)
    wrong = ({"target_words": 0}, {"per_word": -0.1}, {"target_words": "three"})


def answer(text: str) -> Sample:
    """A response to one and the same question."""
    return Sample(Prompt("p", (Message("user", "What is the capital of France?"),)), text)


def test_words_beyond_the_target_cost() -> None:
    """Three words are free; the other two cost 0.5 each."""
    short, long, empty = Brevity(BrevityConfig(target_words=3, per_word=0.5)).score(
        [answer("It is Paris."), answer("Well, it is Paris, obviously."), answer("")]
    )
    assert short.value == 0.0
    assert long.value == -1.0
    assert long.parts == {"words": 5.0}
    assert (empty.value, empty.reason) == (None, "the answer is empty")
