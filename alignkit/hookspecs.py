"""Every extension point: one function, one docstring. A plugin implements the ones it needs and is found by its entry point.

Entry-point group and pluggy project are both ``alignkit``. Parts are chosen by ``kind`` in the config, never by load order.
"""

from __future__ import annotations

import pluggy

from alignkit.interfaces import DataSpec, EvaluatorSpec, OptimizerSpec, PolicySpec, RewardSpec, TrackerSpec

hookspec = pluggy.HookspecMarker("alignkit")
hookimpl = pluggy.HookimplMarker("alignkit")


@hookspec
def register_policies() -> list[PolicySpec]:  # type: ignore[empty-body]
    """Models that can be aligned."""


@hookspec
def register_rewards() -> list[RewardSpec]:  # type: ignore[empty-body]
    """Sources of scores."""


@hookspec
def register_optimizers() -> list[OptimizerSpec]:  # type: ignore[empty-body]
    """Alignment algorithms."""


@hookspec
def register_data_sources() -> list[DataSpec]:  # type: ignore[empty-body]
    """Sources of rows."""


@hookspec
def register_evaluators() -> list[EvaluatorSpec]:  # type: ignore[empty-body]
    """Measurements of finished stages."""


@hookspec
def register_trackers() -> list[TrackerSpec]:  # type: ignore[empty-body]
    """Places where metrics go."""
