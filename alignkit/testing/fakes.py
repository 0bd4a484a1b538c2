"""Small stand-ins: samples to score, a reward that counts, a list as a data source, and a context over a tiny random model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.schema import GuardConfig
from alignkit.context import Context
from alignkit.guards.guard import Guard
from alignkit.interfaces import Policy, Row
from alignkit.journal import Journal
from alignkit.models.config import TinyLMConfig
from alignkit.registry import Registry, find_plugins
from alignkit.tracking import EventLog
from alignkit.types import Message, Plan, Prompt, Sample, Score

if TYPE_CHECKING:
    from alignkit.models.scalar import ScalarModel

TINY = TinyLMConfig(hidden_size=16, layers=1, heads=2, positions=256)


class CountingReward:
    """Scores a response by how often ``text`` occurs in it; ``seen`` keeps the number of samples of each call."""

    def __init__(self, text: str = "e") -> None:
        self.text = text
        self.seen: list[int] = []

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One count a sample."""
        self.seen.append(len(samples))
        return [Score(float(sample.response.count(self.text))) for sample in samples]


class ListSource:
    """A data source of rows that the test wrote down."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = list(rows)

    def rows(self) -> Iterable[Row]:
        """The rows, numbered from 1."""
        return [Row(values, f"list:{number}") for number, values in enumerate(self._rows, start=1)]


def example_samples() -> tuple[Sample, ...]:
    """Samples of every awkward sort: empty, one word, long, of several lines, not English, cut off, twice the same, many turns, plain."""
    question = Prompt("question", (Message("user", "What is the capital of France?"),))
    turns = (Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "And now?"))
    responses = ("It is Paris.", "", "Paris", "well " * 60, "First.\n\n- second\n- third\t!", "C'est Paris — 巴黎 🗼", "It is Paris.")
    return (
        *(Sample(question, response, index=index) for index, response in enumerate(responses)),
        Sample(question, "It is, as far as I", finished=False),
        Sample(Prompt("turns", turns), "Now we talk."),
        Sample(Prompt("plain", (Message("user", "The film was"),), plain=True), " a delight from start to end."),
    )


def make_context(
    folder: Path,
    *,
    registry: Registry | None = None,
    plan: Plan | None = None,
    rows: Sequence[Any] = (),
    seed: int = 0,
    policy: TinyLMConfig = TINY,
) -> Context:
    """The surroundings of a stage in which every model is one tiny random model, written to ``folder`` when it is first asked for.

    ``registry`` is what is installed unless given. Nothing heavy is imported until a model is loaded.
    """
    installed = find_plugins() if registry is None else registry
    spec = installed.policy("tiny_lm")

    def artifact(stage: str | None) -> Path:
        target = folder / "tiny_lm"
        return target if target.is_dir() else spec.prepare(policy, target)

    def load_policy(stage: str | None, trainable: bool) -> Policy:
        return spec.load(policy, artifact(stage), trainable, seed)

    def load_scalar(stage: str | None, trainable: bool) -> ScalarModel:
        return spec.load_scalar(policy, artifact(stage), trainable, seed)

    return Context(
        seed=seed,
        folder=folder,
        registry=installed,
        start=None,
        reference=None,
        plan=plan,
        rows=rows,
        checks=True,
        artifact=artifact,
        load_policy=load_policy,
        load_scalar=load_scalar,
        journal=Journal(folder / "rewards.db"),
        guard=Guard("test", GuardConfig(), "", lambda text: None, EventLog(folder / "events.jsonl")),
        say=lambda text: None,
    )
