"""``alignkit data preview``: a stage's first rows as the model will see them, with what is trained marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.data.codec import TemplateCodec
from alignkit.errors import ConfigError
from alignkit.feed import read_feed
from alignkit.registry import did_you_mean
from alignkit.types import PromptRow, RankedRows, TokenRow

if TYPE_CHECKING:
    from alignkit.config.load import LoadedConfig
    from alignkit.config.schema import StageConfig
    from alignkit.registry import Registry

Mark = Callable[[str], str]
"""Makes trained text recognisable."""

# A line's end is shown and kept; other control characters of the data could otherwise command the terminal.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\t"} | {ord("\n"): "⏎\n"}


def preview(loaded: LoadedConfig, registry: Registry, stage: str, rows: int) -> str:
    """The first ``rows`` rows of a stage, and what becomes of all of them. All rows are read, so every mistake in them is found.

    Raises ``ConfigError`` when there is no such stage or it learns from no data, and what reading the data raises.
    """
    run, chosen = loaded.run, _stage(loaded, stage)
    assert chosen.optimizer is not None
    form = registry.optimizer(chosen.optimizer.kind).feed
    codec: Any = registry.policy(run.policy.kind).codec(run.policy.config, None)
    feed = read_feed(registry, chosen, form, codec)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    text = render(codec, feed.rows[:rows], feed.report["training"], mark=in_colour if coloured else in_brackets)
    return f"stage {stage}: {len(feed.rows)} {'prompts' if form == 'rollouts' else form}, at most {chosen.max_length} tokens\n{text}"


def _stage(loaded: LoadedConfig, name: str) -> StageConfig:
    named = {each.name: each for each in loaded.run.stages}
    learning = [each.name for each in loaded.run.stages if each.optimizer]
    choice = f"stages that learn: {', '.join(learning) or 'none'}"
    if name not in named:
        raise ConfigError([f'{loaded.path}: there is no stage "{name}"{did_you_mean(name, learning)}; {choice}'])
    if name not in learning:
        raise ConfigError([f'{loaded.path}: stage "{name}" evaluates, so it has no data to show; {choice}'])
    return named[name]


def in_brackets(text: str) -> str:
    """⟦text⟧"""
    return f"⟦{text}⟧"


def in_colour(text: str) -> str:
    """⟦text⟧ in green, for a terminal. Each line by itself, so that a pager keeps the colour; brackets, so that a copy keeps the marks."""
    return "\n".join(f"\x1b[32m{line}\x1b[0m" if line else line for line in in_brackets(text).split("\n"))


def render(codec: TemplateCodec, rows: Sequence[TokenRow | RankedRows | PromptRow], report: Mapping[str, Any], *, mark: Mark) -> str:
    """Encoded rows as text, special tokens and line ends visible, after a summary of ``report`` (of ``EncodeReport.as_json``)."""
    cut = set(report["truncated_ids"])
    blocks = [_summary(report), f"{mark('trained')} tokens are marked; ⏎ is the end of a line"]
    for number, row in enumerate(rows, start=1):
        name = row.prompt.id if isinstance(row, PromptRow) else row.id
        title, text = _block(codec, row, mark)
        blocks.append(f"--- {number}: {name}, {title}{', truncated' if name in cut else ''}\n{text}")
    return "\n\n".join(blocks)


def _summary(report: Mapping[str, Any]) -> str:
    counts = f"{report['kept']} kept, {report['truncated']} truncated, {report['dropped']} dropped as too long"
    if report["merged"]:
        counts += f", {report['merged']} with a token that is both prompt and completion"
    return f"{counts}; {report['tokens']} tokens, the longest row has {report['longest']}"


def _block(codec: TemplateCodec, row: TokenRow | RankedRows | PromptRow, mark: Mark) -> tuple[str, str]:
    """A row's title, and its text."""
    if isinstance(row, PromptRow):
        return f"{len(row.ids)} tokens", _shown(codec, row.ids)
    if isinstance(row, TokenRow):
        return f"{sum(row.loss_mask)} of {len(row)} tokens trained", _marked(codec, row, mark)
    shared = row.rows[0].loss_mask.index(True)
    answers = sorted(zip(row.ranks, row.rows, strict=True), key=lambda pair: pair[0])
    lines = [_answer(codec, rank, answer, mark) for rank, answer in answers]
    facts = {"labeler": row.labeler, "weight": row.weight, "margin": row.margin, "preference": row.preference}
    usual = {"labeler": None, "weight": 1.0, "margin": 0.0, "preference": None}
    stated = [f"{name} {value}" for name, value in facts.items() if value != usual[name]]
    title = ", ".join([f"{len(row.rows)} responses after {shared} tokens", *stated])
    return title, "\n".join([_shown(codec, row.rows[0].ids[:shared]), *lines])


def _answer(codec: TemplateCodec, rank: int, row: TokenRow, mark: Mark) -> str:
    start = row.loss_mask.index(True)
    return f"  rank {rank}, {len(row) - start} tokens: {mark(_shown(codec, row.ids[start:]))}"


def _marked(codec: TemplateCodec, row: TokenRow, mark: Mark) -> str:
    """The text of the row, each stretch of trained tokens marked."""
    edges = [i for i in range(1, len(row)) if row.loss_mask[i] != row.loss_mask[i - 1]]
    parts = []
    for begin, end in zip([0, *edges], [*edges, len(row)], strict=True):
        text = _shown(codec, row.ids[begin:end])
        parts.append(mark(text) if row.loss_mask[begin] else text)
    return "".join(parts)


def _shown(codec: TemplateCodec, ids: Sequence[int]) -> str:
    return codec.shown(ids).translate(_VISIBLE)
