"""The journal of answers: asked once, read ever after, and whole whatever happens to the process or the file."""

from __future__ import annotations

import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignkit.api import Component, RewardSpec, State, hookimpl
from alignkit.errors import PluginError, RunError, Unavailable
from alignkit.interfaces import Answer, NoKeys
from alignkit.journal import Journal
from alignkit.registry import Registry
from alignkit.rewards import MixConfig, PartConfig
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, Sample, Score


def samples(*responses: str) -> list[Sample]:
    return [Sample(Prompt(f"p{i}", (Message("user", "?"),)), response) for i, response in enumerate(responses)]


class Dice:
    """Answers otherwise each time it is asked: 1, 2, 3, ... ``asked`` are the responses, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.asked += [sample.response for sample in samples]
        return [Score(float(len(self.asked) - len(samples) + i + 1), {"number": 0.5}) for i in range(len(samples))]


class Service(Dice):
    """The same in batches of two, the last one first; ``fails`` says after how many of them it is away."""

    def __init__(self, fails: int = 1000, masked: str = "") -> None:
        super().__init__()
        self.fails, self.masked = fails, masked

    def answers(self, samples: Sequence[Sample]) -> Iterator[Sequence[Answer]]:
        for number, start in enumerate(reversed(range(0, len(samples), 2))):
            if number == self.fails:
                raise Unavailable("away")
            batch = range(start, min(start + 2, len(samples)))
            scores = super().score([samples[i] for i in batch])
            lost = [samples[i].response == self.masked for i in batch]
            yield [
                Answer(i, Score(None, reason="late") if none else score, answered=not none)
                for i, score, none in zip(batch, scores, lost, strict=True)
            ]


def values(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rewards.db"


def test_a_step_done_again_reads_what_was_answered_and_asks_nobody(path: Path) -> None:
    dice = Dice()
    with closing(Journal(path)) as journal:
        kept = journal.keep(dice, "dice")
        first = []
        for step in (1, 2, 3):
            journal.begin(step)
            first.append(kept.score(samples("a", "b")))
    assert [values(scores) for scores in first] == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    with closing(Journal(path)) as journal:  # killed, and continued after step 1
        kept = journal.keep(dice, "dice")
        for step in (2, 3):
            journal.begin(step)
            assert kept.score(samples("a", "b")) == first[step - 1]
        journal.begin(4)
        assert values(kept.score(samples("a", "b"))) == [7.0, 8.0]
    assert len(dice.asked) == 8


def test_a_source_that_was_never_asked_leaves_no_file(path: Path) -> None:
    with closing(Journal(path)) as journal:
        journal.begin(1)
        journal.keep(Dice(), "dice")
    assert not path.exists()


def test_only_what_is_missing_is_asked_and_each_batch_is_kept_as_it_comes(path: Path) -> None:
    away, back = Service(fails=2), Service()
    with closing(Journal(path)) as journal:
        journal.begin(1)
        with pytest.raises(Unavailable):
            journal.keep(away, "service").score(samples("a", "b", "c", "d", "e", "f"))
        assert away.asked == ["e", "f", "c", "d"]
        journal.begin(1)
        scores = journal.keep(back, "service").score(samples("a", "b", "c", "d", "e", "f"))
    assert back.asked == ["a", "b"]
    assert values(scores) == [1.0, 2.0, 3.0, 4.0, 1.0, 2.0]


def test_what_nobody_answered_is_asked_again_and_a_verdict_of_none_is_not(path: Path) -> None:
    class Silent(Dice):
        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(None, reason="not English") for _ in super().score(samples)]

    late, silent = Service(masked="b"), Silent()
    with closing(Journal(path)) as journal:
        for _ in range(2):
            journal.begin(1)
            assert values(journal.keep(late, "late").score(samples("a", "b"))) == [1.0, None]
            assert journal.keep(silent, "silent").score(samples("a"))[0].reason == "not English"
    assert late.asked == ["a", "b", "b"]
    assert silent.asked == ["a"]


def test_equal_samples_of_a_step_are_asked_one_by_one_and_told_apart(path: Path) -> None:
    dice = Dice()
    twice = samples("a") * 2
    with closing(Journal(path)) as journal:
        for _ in range(2):
            journal.begin(1)
            kept = journal.keep(dice, "dice")
            assert values(kept.score(twice)) == [1.0, 2.0]
            assert values(kept.score(twice)) == [3.0, 4.0]
    assert len(dice.asked) == 4


def test_another_scorer_or_another_sample_is_another_question(path: Path) -> None:
    dice, [one] = Dice(), samples("a")
    others = [
        replace(one, response="b"),
        replace(one, index=1),
        replace(one, finished=False),
        replace(one, prompt=replace(one.prompt, id="q")),
        replace(one, prompt=replace(one.prompt, plain=True)),
        replace(one, prompt=replace(one.prompt, messages=(Message("system", "?"),))),
        replace(one, prompt=replace(one.prompt, metadata={"answer": 1})),
    ]
    with closing(Journal(path)) as journal:
        for scorer in ("dice", "other dice"):
            for sample in (one, *others):
                journal.begin(1)
                journal.keep(dice, scorer).score([sample])
        journal.begin(1)
        elsewhere = replace(one, prompt=replace(one.prompt, origin="another file"))
        assert values(journal.keep(dice, "dice").score([elsewhere])) == [1.0]
    assert len(dice.asked) == 16


def test_a_score_is_read_as_it_was_given_to_the_bit(path: Path) -> None:
    finite, any_text = st.floats(allow_nan=False, allow_infinity=False), st.text(st.characters(exclude_categories=()), max_size=8)
    steps = itertools.count()

    @given(st.builds(Score, st.none() | finite, st.dictionaries(any_text, finite, max_size=2), st.none() | any_text), any_text)
    def holds(score: Score, response: str) -> None:
        journal.begin(next(steps))
        [question] = journal.questions("scorer", samples(response))
        journal.write({question: score})
        assert repr(journal.read([question])[question]) == repr(score)  # -0.0 is not 0.0

    with closing(Journal(path)) as journal:
        holds()


@pytest.mark.parametrize("score", [Score(float("nan")), Score(1.0, {"part": float("inf")})])
def test_a_score_that_is_no_number_is_refused(path: Path, score: Score) -> None:
    class Broken:
        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [score]

    with closing(Journal(path)) as journal, pytest.raises(RunError, match=r"reward source broken answered .*; allowed: finite numbers"):
        journal.keep(Broken(), "broken").score(samples("a"))


def test_a_source_that_forgets_a_sample_is_named(path: Path) -> None:
    class Short:
        def score(self, samples: Sequence[Sample]) -> list[Score]:
            return [Score(1.0)]

    with closing(Journal(path)) as journal, pytest.raises(RunError, match="reward source short scored 1 of 2 samples"):
        journal.keep(Short(), "short").score(samples("a", "b"))


def test_a_journal_and_a_state_exclude_each_other(path: Path) -> None:
    class Both(Dice):
        def state(self) -> State:
            return State()

        def load_state(self, state: State) -> None: ...

    with pytest.raises(PluginError, match="reward source both asks for a journal and has a state of its own"):
        Journal(path).keep(Both(), "both")


def test_the_parts_of_a_mix_have_each_their_answers_kept(tmp_path: Path) -> None:
    dice, plain = Dice(), Dice()

    class Plugin:
        @staticmethod
        @hookimpl
        def register_rewards() -> list[RewardSpec]:
            return [
                RewardSpec(kind="zeta_dice", summary="", config=NoKeys, build=lambda config, context: dice, journal=True),
                RewardSpec(kind="zeta_plain", summary="", config=NoKeys, build=lambda config, context: plain),
            ]

    from alignkit import builtin

    context = make_context(tmp_path, registry=Registry.of(builtin, Plugin))
    parts = [PartConfig(name=kind, source=Component(f"zeta_{kind}", NoKeys())) for kind in ("dice", "plain")]
    same = PartConfig(name="again", source=Component("zeta_dice", NoKeys()))
    mix = context.build_reward(Component("mix", MixConfig(parts=(*parts, same))))
    for _ in range(2):
        context.journal.begin(1)
        [score] = mix.score(samples("a"))
        assert (score.parts["dice"], score.parts["again"]) == (1.0, 2.0)
    context.journal.close()
    assert (len(dice.asked), len(plain.asked)) == (2, 2)


def test_somebody_may_read_while_it_is_written(path: Path) -> None:
    with closing(Journal(path)) as journal:
        kept = journal.keep(Dice(), "dice")
        journal.begin(1)
        kept.score(samples("a"))
        readers = [sqlite3.connect(path) for _ in range(2)]
        for reader in readers:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM answer").fetchone() == (1,)
        journal.begin(2)
        kept.score(samples("b"))
        for reader in readers:
            assert reader.execute("SELECT count(*) FROM answer").fetchone() == (1,)  # what there was when it began to look
            reader.rollback()
            assert reader.execute("SELECT step, sample_id, json_extract(score, '$.value') FROM answer ORDER BY 1").fetchall() == [
                (1, "p0/0", 1.0),
                (2, "p0/0", 2.0),
            ]
            reader.close()


@pytest.mark.parametrize("lost", [1, 100, 4000])
def test_a_torn_write_is_an_answer_that_never_came(path: Path, tmp_path: Path, lost: int) -> None:
    """The power fails while the second batch is written: the end of the log is missing, or rubbish."""
    dice = Dice()
    with closing(Journal(path)) as journal:
        kept = journal.keep(dice, "dice")
        for step in (1, 2):
            journal.begin(step)
            kept.score(samples("a", "b"))
        torn = tmp_path / "torn"
        torn.mkdir()
        for file in tmp_path.glob("rewards.db*"):
            shutil.copy(file, torn)
    log = torn / "rewards.db-wal"
    content = log.read_bytes()
    log.write_bytes(content[:-lost] + (b"\xff" * lost if lost == 100 else b""))
    with closing(Journal(torn / "rewards.db")) as journal:
        kept = journal.keep(dice, "dice")
        journal.begin(1)
        assert values(kept.score(samples("a", "b"))) == [1.0, 2.0]
        journal.begin(2)
        assert values(kept.score(samples("a", "b"))) == [5.0, 6.0]


WRITER = """
import sys
from pathlib import Path
from alignkit.journal import Journal
from tests.test_journal import samples
from alignkit.types import Score
journal = Journal(Path(sys.argv[1]))
for step in range(int(sys.argv[2]), 1_000_000):
    journal.begin(step)
    journal.write({question: Score(float(step)) for question in journal.questions("scorer", samples(*"abcdefgh"))})
    print(step, flush=True)
"""


def test_what_was_written_when_the_process_was_killed_is_there_and_whole(path: Path) -> None:
    done = 0
    for kill_after in (1, 20):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(done + 1)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(kill_after):
            line = process.stdout.readline()
        process.kill()
        last = int((line + process.stdout.read()).split()[-1])
        process.wait()
        with closing(Journal(path)) as journal:
            for step in range(1, last + 1):
                journal.begin(step)
                assert set(values(list(journal.read(journal.questions("scorer", samples(*"abcdefgh"))).values()))) == {float(step)}
            journal.begin(last + 1)  # it may have been written, and not been told
            found = journal.read(journal.questions("scorer", samples(*"abcdefgh")))
            assert len(found) in (0, 8)
            done = last + bool(found)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM answer").fetchone() == (8 * done,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_cannot_be_used_is_an_error_with_its_name(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)
    with (
        closing(Journal(path)) as journal,
        pytest.raises(RunError, match=r"rewards\.db, the journal .*, is damaged: file is not a database"),
    ):
        journal.keep(Dice(), "dice").score(samples("a"))
    nowhere = Journal(path.parent / "nowhere" / "rewards.db")
    with pytest.raises(RunError, match="cannot be used: unable to open database file; what is in it is intact"):
        nowhere.keep(Dice(), "dice").score(samples("a"))


def test_a_score_that_was_damaged_on_the_disk_is_not_guessed_at(path: Path) -> None:
    with closing(Journal(path)) as journal:
        kept = journal.keep(Dice(), "dice")
        journal.begin(1)
        kept.score(samples("a"))
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE answer SET score = ?", (json.dumps({"value": 1.0})[:-3],))
        journal.begin(1)
        with pytest.raises(RunError, match="is damaged"):
            kept.score(samples("a"))
