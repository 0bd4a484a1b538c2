"""Conformance tests to inherit from: what alignkit expects of every plugin, and of reward sources and data sources in particular.

A subclass in a plugin's own test file names its ``spec`` and a valid ``config``; pytest collects the tests that it inherits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from alignkit.interfaces import Artifact, DataSource, DataSpec, RewardSource, RewardSpec, Row, Spec, State, Stateful
from alignkit.registry import Registry, find_plugins
from alignkit.testing.fakes import example_samples, make_context
from alignkit.testing.imports import assert_light
from alignkit.testing.settings import parsed, plain, refusal
from alignkit.types import Sample, Score


class Conformance:
    """What every plugin must do.

    ``config`` is an instance of the spec's dataclass that can be built. ``wrong`` are settings that must be refused, each laid over
    ``config``: ``{"target_words": 0}``. ``earlier`` are the stages that ``config`` refers to, with what each makes.
    """

    interface: ClassVar[type]
    spec: Spec
    config: Any
    wrong: Sequence[Mapping[str, Any]] = ()
    earlier: Mapping[str, Artifact] = MappingProxyType({})

    def registry(self) -> Registry:
        """Where kinds are looked up: what is installed, your package included."""
        return find_plugins()

    def test_the_kind_is_found(self) -> None:
        """The entry point leads to the declaration: fails until the package is installed (``pip install --editable .``)."""
        found = self.registry().spec(self.interface, self.spec.kind)
        assert found.config is self.spec.config, f"the kind {self.spec.kind} is another package's: its config is {found.config}"

    def test_the_declaration_is_light(self) -> None:
        """The modules of the config and of ``build`` import nothing heavy, so that help, ``check`` and ``plugins`` are instant."""
        build: Any = vars(self.spec)["build"]
        assert_light(sorted({self.spec.config.__module__, build.__module__}))

    def test_the_config_survives_a_config_file(self) -> None:
        """Written as YAML and read again, it is the same dataclass with the same values."""
        again = parsed(self.interface, self.spec.kind, plain(self.config), self.registry(), self.earlier)
        assert again == self.config, f"{self.config} became {again}"

    def test_mistakes_in_the_config_are_refused_with_a_message(self) -> None:
        """An unknown key, and everything in ``wrong``, is an ``AlignkitError`` and not an exception of another kind."""
        for settings in ({"no_such_key": 1}, *self.wrong):
            message = refusal(self.interface, self.spec.kind, {**plain(self.config), **settings}, self.registry(), self.earlier)
            assert message is not None, f"{settings} was accepted"
            assert any(key in message for key in settings), f"the message names none of {', '.join(settings)}: {message}"


class RewardSourceConformance(Conformance):
    """What every reward source must do. ``tolerance`` allows for arithmetic that depends on how samples are batched."""

    interface = RewardSource
    spec: RewardSpec
    samples: Sequence[Sample] = example_samples()
    tolerance: float = 1e-5

    def build(self, folder: Path) -> RewardSource:
        """The source, in a context whose models are one tiny random model."""
        return self.spec.build(self.config, make_context(folder, registry=self.registry()))

    def test_each_sample_has_one_score(self, tmp_path: Path) -> None:
        """As many as there are samples, each a finite number, or None with a reason."""
        scores = self.build(tmp_path).score(self.samples)
        assert len(scores) == len(self.samples), f"{len(scores)} scores for {len(self.samples)} samples"
        for sample, score in zip(self.samples, scores, strict=True):
            assert isinstance(score, Score), f"{score!r} is not a Score"
            if score.value is None:
                assert score.reason, f"no verdict on {sample.response!r}, and no reason"
            else:
                assert math.isfinite(score.value), f"{score.value} for {sample.response!r}"
            assert all(math.isfinite(part) for part in score.parts.values()), score.parts

    def test_nothing_in_nothing_out(self, tmp_path: Path) -> None:
        """No samples, no scores."""
        scores = list(self.build(tmp_path).score([]))
        assert scores == [], f"{scores} for no samples"

    def test_a_score_does_not_depend_on_the_batch(self, tmp_path: Path) -> None:
        """The same sample scores the same alone, among others, and in another order."""
        source = self.build(tmp_path)
        together = source.score(self.samples)
        alone = [source.score([sample])[0] for sample in self.samples]
        backwards = list(source.score(self.samples[::-1]))[::-1]
        for sample, *scores in zip(self.samples, together, alone, backwards, strict=True):
            assert self._equal(scores[0], scores[1]), f"{sample.response!r} scores {scores[0]} among others and {scores[1]} alone"
            assert self._equal(scores[0], scores[2]), f"{sample.response!r} scores {scores[0]}, and {scores[2]} in another order"

    def test_a_loaded_state_scores_the_same(self, tmp_path: Path) -> None:
        """For a source that changes while it runs: a new one that loads its state is the same source, and stays so.

        The global random generators are part of a checkpoint; a generator of the source's own has to be in its state.
        """
        from alignkit.generators import Generators

        generators = Generators(0)
        source = self.build(tmp_path)
        if not isinstance(source, Stateful):
            return
        source.score(self.samples)
        state, drawn = source.state(), generators.state()
        assert_plain_values(state)
        values = copy.deepcopy(dict(state.values))
        expected = [source.score(self.samples[number:]) for number in range(3)]
        again = self.build(tmp_path)
        assert isinstance(again, Stateful)
        again.load_state(State(state.tensors, values))
        assert dict(again.state().values) == values, f"state() after load_state(saved) is not what was saved: {again.state().values}"
        generators.load_state(drawn)
        for number, scores in enumerate(expected):
            for old, new in zip(scores, again.score(self.samples[number:]), strict=True):
                assert self._equal(old, new), f"{old} became {new}"

    def _equal(self, left: Score, right: Score) -> bool:
        if left.value is None or right.value is None:
            return left.value is right.value
        return math.isclose(left.value, right.value, rel_tol=self.tolerance, abs_tol=self.tolerance)


class DataSourceConformance(Conformance):
    """What every data source must do."""

    interface = DataSource
    spec: DataSpec

    def build(self) -> DataSource:
        """The source."""
        return self.spec.build(self.config)

    def test_rows_have_values_and_an_origin(self) -> None:
        """At least one row; each names the place it came from, each another."""
        rows = list(self.build().rows())
        assert rows, "there are no rows"
        for row in rows:
            assert isinstance(row, Row), f"{row!r} is not a Row"
            assert row.origin, f"{row.values} names no origin"
            assert all(isinstance(key, str) for key in row.values), row.values
        assert len({row.origin for row in rows}) == len(rows), "two rows name the same origin"

    def test_rows_are_the_same_every_time(self) -> None:
        """Asked again, and built again: a run that continues must find the rows where they were."""
        source = self.build()
        rows = list(source.rows())
        assert list(source.rows()) == rows, "asked again, the source has other rows, or the same in another order"
        assert list(self.build().rows()) == rows, "built again, the source has other rows, or the same in another order"


def assert_plain_values(state: State) -> None:
    """A state's values can be written as JSON and read again unchanged (a tuple cannot: it comes back as a list)."""
    assert json.loads(json.dumps(dict(state.values))) == dict(state.values), f"not plain JSON: {state.values}"
