"""Rounds and lineage as people read them in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from alignkit_serve.store.feedback import Feedback
from alignkit_serve.store.lineage import Exported, OfFeedback, OfPolicy, Reach
from alignkit_serve.store.policies import PolicyVersion
from alignkit_serve.store.rounds import Round


def rounds_table(rounds: Sequence[Round], exports: Mapping[str, Exported], names: Mapping[str, str]) -> Table:
    """One line a round. ``names``: of policies, by id."""
    table = Table()
    for column in ("round", "policy", "trained on", "agree", "win rate (95%)", "KL from first", "outcome"):
        table.add_column(column, overflow="fold")
    for made in rounds:
        metrics = made.metrics
        row = (
            made.name,
            names[made.child_policy_id],
            _data(exports[id] for id in made.exports),
            _share(_agreement(metrics.get("agreement"))),
            f"{_share(metrics.get('win_rate'))} ({_share(metrics.get('ci95_low'))} to {_share(metrics.get('ci95_high'))})",
            _number(metrics.get("kl_first_nats")),
            outcome(made),
        )
        table.add_row(*map(Text, row))
    return table


def outcome(made: Round) -> str:
    """What became of a round's policy."""
    if made.promoted:
        return "promoted"
    why = made.metrics.get("refused_because")
    return f"refused: {why}" if why else "not promoted"


def feedback_tree(found: OfFeedback) -> Tree:
    """Where feedback went, the oldest of it first."""
    tree = Tree(_feedback(found.feedback))
    if len(found.history) > 1:
        history = tree.add("history")
        for each in found.history:
            history.add(_feedback(each))
    for export in found.reach.exports:
        branch = tree.add(_export(export))
        rows = [place.row_no for place in found.places if place.export_id == export.id]
        branch.add(Text(f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"))
        _add_rounds(branch, [made for made in found.reach.rounds if export.id in made.exports])
    if not found.reach.exports:
        tree.add("in no export")
    _add_policies(tree, found.reach)
    return tree


def policy_tree(found: OfPolicy) -> Tree:
    """What a policy came from and learnt from."""
    tree = Tree(_policy(found.policy))
    came = tree.add("came from" if found.ancestors else "came from no other policy that is known here")
    for version in found.ancestors:
        came = came.add(_policy(version))
    _add_rounds(tree, found.rounds)
    for export in found.exports:
        tree.add(_export(export))
    if found.feedback:
        kinds = tree.add(Text(f"{sum(found.feedback.values())} pieces of feedback"))
        for kind, count in found.feedback.items():
            kinds.add(Text(f"{count} {kind}"))
        authors = tree.add(Text(f"{len(found.annotators)} annotators"))
        for annotator_id, share in found.annotators.items():
            authors.add(Text(f"{share:.1%} {annotator_id}"))
    if found.tainted:
        tainted = tree.add("tainted: it, or a policy that it came from, learnt from what was erased since")
        for export in found.tainted:
            tainted.add(_export(export))
    return tree


def _add_rounds(tree: Tree, rounds: Iterable[Round]) -> None:
    for made in rounds:
        tree.add(Text(f"round {made.name} ({made.id}) made {made.child_policy_id}: {outcome(made)}"))


def _add_policies(tree: Tree, reach: Reach) -> None:
    if reach.policies:
        saw = tree.add("policies that saw it, or came from one that did")
        for version in reach.policies:
            saw.add(_policy(version))


def _policy(version: PolicyVersion) -> Text:
    return Text(f"policy {version.name} ({version.state})")


def _export(export: Exported) -> Text:
    tainted = f", tainted since {export.tainted_at:%Y-%m-%d %H:%M}" if export.tainted_at else ""
    return Text(f"export {export.name} ({export.id}): {export.n_rows} {export.shape}, {export.split}{tainted}")


def _feedback(one: Feedback) -> Text:
    reason = f": {one.reason}" if one.reason else ""
    return Text(f"{one.kind} {one.id} on {one.target_type} {one.target_id} ({one.state}{reason})")


def _data(exports: Iterable[Exported]) -> str:
    rows = Counter[str]()
    for export in exports:
        # What is held out was not trained on.
        rows[export.shape] += export.n_rows if export.split != "holdout" else 0
    return ", ".join(f"{count} {shape}" for shape, count in sorted(rows.items()) if count) or "nothing of this server"


def _agreement(told: Any) -> Any:
    """A round's note of how far annotators agreed: a number, or that with its interval."""
    return told.get("value") if isinstance(told, dict) else told


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
