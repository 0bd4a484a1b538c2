"""What ``alignkit plugins`` prints: kinds by interface with the package they came in, then what failed, why, and what to do."""

from __future__ import annotations

from alignkit.registry import EXTENSIONS, Registry


def describe_plugins(registry: Registry) -> str:
    """The installed kinds in aligned columns of plain text, the same in a terminal and in a pipe."""
    rows = {
        extension.word: sorted(
            (spec.kind, f"{plugin.package} {plugin.version}", spec.summary)
            for plugin in registry.plugins
            for spec in plugin.specs[extension.interface]
        )
        for extension in EXTENSIONS
    }
    everything = [row for section in rows.values() for row in section]
    kind_width = max((len(kind) for kind, _, _ in everything), default=0)
    package_width = max((len(package) for _, package, _ in everything), default=0)
    lines = []
    for word, section in rows.items():
        lines += [_plural(word)]
        lines += [f"  {kind:<{kind_width}}  {package:<{package_width}}  {summary}" for kind, package, summary in section] or ["  none"]
        lines += [""]
    if registry.failures:
        lines += ["failed to load"]
        lines += [line for failure in registry.failures for line in (f"  {failure}", f"    to repair: {failure.remedy}")]
    else:
        lines += ["no plugin failed to load"]
    return "\n".join(lines)


def _plural(word: str) -> str:
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
