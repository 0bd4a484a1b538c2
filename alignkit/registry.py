"""Finds plugins, collects what they declare, and explains what is wrong with them. A registry is a value: built once, then passed."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

import alignkit
from alignkit import hookspecs
from alignkit.errors import PluginError
from alignkit.interfaces import (
    API_VERSION,
    Command,
    CommandSpec,
    DataSource,
    DataSpec,
    Evaluator,
    EvaluatorSpec,
    Optimizer,
    OptimizerSpec,
    Policy,
    PolicySpec,
    RewardSource,
    RewardSpec,
    Spec,
    Tracker,
    TrackerSpec,
)

GROUP = "alignkit"
"""The entry-point group, and the name of the pluggy project."""


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension point: the interface that a config names, the spec that declares it, the hook that returns specs."""

    interface: type
    spec: type[Spec]
    word: str
    hook: str


EXTENSIONS = (
    Extension(Policy, PolicySpec, "policy", hookspecs.register_policies.__name__),
    Extension(RewardSource, RewardSpec, "reward source", hookspecs.register_rewards.__name__),
    Extension(Optimizer, OptimizerSpec, "optimizer", hookspecs.register_optimizers.__name__),
    Extension(DataSource, DataSpec, "data source", hookspecs.register_data_sources.__name__),
    Extension(Evaluator, EvaluatorSpec, "evaluator", hookspecs.register_evaluators.__name__),
    Extension(Tracker, TrackerSpec, "tracker", hookspecs.register_trackers.__name__),
    Extension(Command, CommandSpec, "command", hookspecs.register_commands.__name__),
)

_UNINSTALL = "uninstall all but one of them"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin that loaded: the entry point's name, the distribution it came in, and its specs by interface."""

    name: str
    package: str
    version: str
    specs: Mapping[type, tuple[Spec, ...]]

    def __str__(self) -> str:
        return f"{self.package} {self.version} (plugin {self.name!r})"


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """A plugin that cannot be used, or (with several names) plugins that claim the same kind; ``remedy`` is what to do about it."""

    name: str
    package: str
    error: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} (package {self.package}): {self.error}"


@dataclass(frozen=True, slots=True)
class Registry:
    """All that is installed. A kind that several plugins claim belongs to none of them, whatever the order they loaded in."""

    plugins: tuple[PluginInfo, ...]
    failures: tuple[PluginFailure, ...] = ()

    @classmethod
    def of(cls, *plugins: object) -> Registry:
        """A registry of modules or namespaces with hook implementations, for tests and notebooks. Raises ``PluginError``."""
        loaded = []
        for plugin in plugins:
            name = plugin.__name__ if inspect.ismodule(plugin) or inspect.isclass(plugin) else type(plugin).__name__
            loaded.append(PluginInfo(name, name, "unpackaged", declared_specs(plugin)))
        return _with_clashes(loaded, [])

    def specs(self, interface: type) -> Mapping[str, Spec]:
        """The specs of ``interface`` by kind, sorted; clashing kinds are left out."""
        claims = self._claims(interface)
        return {kind: claims[kind][0][1] for kind in sorted(claims) if len(claims[kind]) == 1}

    def spec(self, interface: type, kind: str) -> Spec:
        """The one spec of ``kind``; raises ``PluginError`` that says why there is none, or which packages claim it."""
        claims = self._claims(interface).get(kind, [])
        if len(claims) == 1:
            return claims[0][1]
        raise PluginError(f"{self._clash(interface, kind)}; {_UNINSTALL}" if claims else self._unknown(interface, kind))

    def policy(self, kind: str) -> PolicySpec:
        """The policy of that kind."""
        return cast(PolicySpec, self.spec(Policy, kind))

    def reward(self, kind: str) -> RewardSpec:
        """The reward source of that kind."""
        return cast(RewardSpec, self.spec(RewardSource, kind))

    def optimizer(self, kind: str) -> OptimizerSpec:
        """The optimizer of that kind."""
        return cast(OptimizerSpec, self.spec(Optimizer, kind))

    def data(self, kind: str) -> DataSpec:
        """The data source of that kind."""
        return cast(DataSpec, self.spec(DataSource, kind))

    def evaluator(self, kind: str) -> EvaluatorSpec:
        """The evaluator of that kind."""
        return cast(EvaluatorSpec, self.spec(Evaluator, kind))

    def tracker(self, kind: str) -> TrackerSpec:
        """The tracker of that kind."""
        return cast(TrackerSpec, self.spec(Tracker, kind))

    def command(self, name: str) -> CommandSpec:
        """The command of that name."""
        return cast(CommandSpec, self.spec(Command, name))

    def _claims(self, interface: type) -> dict[str, list[tuple[PluginInfo, Spec]]]:
        """Who declares which kind."""
        claims: dict[str, list[tuple[PluginInfo, Spec]]] = {}
        for plugin in self.plugins:
            for spec in plugin.specs.get(interface, ()):
                claims.setdefault(spec.kind, []).append((plugin, spec))
        return claims

    def _clash(self, interface: type, kind: str) -> str:
        owners = " and ".join(str(plugin) for plugin, _ in self._claims(interface)[kind])
        return f'the {_word(interface)} kind "{kind}" is declared by {owners}'

    def _unknown(self, interface: type, kind: str) -> str:
        known = self.specs(interface)
        message = f'there is no {_word(interface)} of kind "{kind}"{did_you_mean(kind, known)}; installed: {", ".join(known) or "none"}'
        if self.failures:
            message += "; failed to load: " + "; ".join(str(failure) for failure in self.failures)
        return message


def find_plugins() -> Registry:
    """The core's own declarations and every installed plugin's, each loaded apart: a broken one is recorded and harms nothing else."""
    from alignkit import builtin

    loaded = [PluginInfo("builtin", "alignkit", alignkit.__version__, declared_specs(builtin))]
    failures = []
    for entry_point in sorted(entry_points(group=GROUP), key=lambda found: (_package(found), found.name)):
        try:
            specs = declared_specs(entry_point.load())
        # A stranger's module may do anything while it is imported, leaving the interpreter included.
        except (Exception, SystemExit) as error:
            package = _package(entry_point)
            remedy = f"pip install --upgrade {package}, or pip uninstall {package}"
            failures.append(PluginFailure(entry_point.name, package, _describe(error), remedy))
        else:
            version = entry_point.dist.version if entry_point.dist else "unknown"
            loaded.append(PluginInfo(entry_point.name, _package(entry_point), version, specs))
    return _with_clashes(loaded, failures)


def declared_specs(plugin: object) -> Mapping[type, tuple[Spec, ...]]:
    """What one plugin declares, by interface. Raises ``PluginError`` for a declaration that cannot be accepted."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    hooks = manager.get_hookcallers(plugin) or []
    if not hooks:
        raise PluginError("it implements no hook; decorate a function such as `register_rewards` with `alignkit.api.hookimpl`")
    for hook in hooks:
        if not hook.has_spec() and not all(implementation.optionalhook for implementation in hook.get_hookimpls()):
            known = [extension.hook for extension in EXTENSIONS]
            raise PluginError(f'there is no hook "{hook.name}"{did_you_mean(hook.name, known)}; hooks: {", ".join(known)}')
    return {extension.interface: _accepted(extension, getattr(manager.hook, extension.hook)()) for extension in EXTENSIONS}


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """`` (did you mean "..."?)`` for the nearest of ``allowed``, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _accepted(extension: Extension, results: Sequence[Any]) -> tuple[Spec, ...]:
    """The specs that a plugin's hook returned, checked."""
    specs: list[Spec] = []
    for result in results:
        if not isinstance(result, list | tuple):
            raise PluginError(f"{extension.hook} returned {result!r}; a list of {extension.spec.__name__} is needed")
        specs.extend(result)
    for spec in specs:
        _check(extension, spec)
    kinds = [spec.kind for spec in specs]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise PluginError(f'{extension.hook} declares the kind "{kind}" {kinds.count(kind)} times')
    return tuple(specs)


def _check(extension: Extension, spec: Any) -> None:
    if not isinstance(spec, extension.spec):
        raise PluginError(f"{extension.hook} returned {spec!r}; each item must be a {extension.spec.__name__}")
    if spec.api != API_VERSION:
        raise PluginError(
            f'"{spec.kind}" was written for plugin API {spec.api}; alignkit {alignkit.__version__} speaks plugin API {API_VERSION}: '
            "install releases of the two that agree"
        )
    if not isinstance(spec.kind, str) or not spec.kind:
        raise PluginError(f"{extension.hook}: `kind` is {spec.kind!r}; a name that is not empty is needed")
    config: Any = spec.config
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)) or not cast(Any, config).__dataclass_params__.frozen:
        raise PluginError(f'"{spec.kind}": `config` is {config!r}; a class decorated with `@dataclass(frozen=True)` is needed')


def _with_clashes(plugins: Sequence[PluginInfo], failures: Sequence[PluginFailure]) -> Registry:
    """The registry, with one more failure for each kind that several plugins claim."""
    registry = Registry(tuple(plugins))
    clashes = []
    for extension in EXTENSIONS:
        for kind, claims in registry._claims(extension.interface).items():
            if len(claims) > 1:
                owners = [plugin for plugin, _ in claims]
                names, packages = ", ".join(plugin.name for plugin in owners), ", ".join(plugin.package for plugin in owners)
                clashes.append(PluginFailure(names, packages, registry._clash(extension.interface, kind), _UNINSTALL))
    return Registry(tuple(plugins), (*failures, *clashes))


def _word(interface: type) -> str:
    return next(extension.word for extension in EXTENSIONS if extension.interface is interface)


def _package(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else "unknown"


def _describe(error: BaseException) -> str:
    """One line: the message of a declaration that was refused, or the type and message of whatever else went wrong."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".rstrip(": ")
