"""Every extension point: one function, one docstring. A plugin implements the ones it needs and is found by its entry point.

Entry-point group and pluggy project are both ``alignkit``. Parts are chosen by ``kind`` in the config, never by load order.
"""

from __future__ import annotations

import pluggy

from alignkit.interfaces import CommandSpec, DataSpec, EvaluatorSpec, OptimizerSpec, PolicySpec, RewardSpec, TrackerSpec

hookspec = pluggy.HookspecMarker("alignkit")
hookimpl = pluggy.HookimplMarker("alignkit")


@hookspec
def register_policies() -> list[PolicySpec]:
    """Models that can be aligned."""


@hookspec
def register_rewards() -> list[RewardSpec]:
    """Sources of scores."""


@hookspec
def register_optimizers() -> list[OptimizerSpec]:
    """Alignment algorithms."""


@hookspec
def register_data_sources() -> list[DataSpec]:
    """Sources of rows."""


@hookspec
def register_evaluators() -> list[EvaluatorSpec]:
    """Measurements of finished stages."""


@hookspec
def register_trackers() -> list[TrackerSpec]:
    """Places where metrics go."""


@hookspec
def register_commands() -> list[CommandSpec]:
    """Commands of the command line, beside its own."""
