"""What people, services and judges answered, written down before it is used: a step that is done again reads it, and asks nobody twice.

One SQLite file a stage, ``rewards.db``, made when the first answer is looked for. An answer is known by the stage's step, by who gave it,
by all that was seen of the sample, and by which of several equal samples of the step it is about. See docs/decisions/0019-journal.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignkit.errors import PluginError, RunError
from alignkit.interfaces import Answer, RewardService, RewardSource, Stateful
from alignkit.types import Sample, Score

_TABLE = """
CREATE TABLE IF NOT EXISTS answer (
    step INTEGER NOT NULL,       -- of the stage, from 1; 0 where there are no steps
    scorer TEXT NOT NULL,        -- sha256 of the source's kind and config
    sample TEXT NOT NULL,        -- sha256 of all that the source is shown of a sample
    occurrence INTEGER NOT NULL, -- of equal samples in one step, from 0
    sample_id TEXT NOT NULL,
    score TEXT NOT NULL,         -- JSON: value, parts, reason
    answered_at TEXT NOT NULL,
    PRIMARY KEY (step, scorer, sample, occurrence)
) WITHOUT ROWID
"""
_READ = "SELECT score FROM answer WHERE step = ? AND scorer = ? AND sample = ? AND occurrence = ?"
_WRITE = "INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?)"
_LOCK_SECONDS = 30.0  # somebody may be looking at the file


@dataclass(frozen=True, slots=True)
class Question:
    """One sample as one source is asked about it in one step."""

    step: int
    scorer: str
    sample: str
    occurrence: int
    sample_id: str


class Journal:
    """The answers of one stage. ``begin(step)`` says which step is being made; a stage without steps begins none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._step = 0
        self._asked: Counter[tuple[str, str]] = Counter()
        self._connection: sqlite3.Connection | None = None

    def begin(self, step: int) -> None:
        """What is asked from now on belongs to ``step``."""
        self._step = step
        self._asked.clear()

    def keep(self, source: RewardSource, scorer: str) -> RewardSource:
        """``source``, whose answers go through the journal. ``scorer`` is who it is: another text asks anew."""
        if isinstance(source, Stateful):
            raise PluginError(
                f"the reward source {scorer} asks for a journal and has a state of its own; what is read from a journal changes no state: "
                "declare it without `journal`, or without `state` and `load_state`"
            )
        return _Kept(source, self, scorer)

    def questions(self, scorer: str, samples: Sequence[Sample]) -> list[Question]:
        """One question a sample, no two alike in this step."""
        return [self._question(_sha256(scorer), sample) for sample in samples]

    def _question(self, scorer: str, sample: Sample) -> Question:
        digest = _sha256(_seen(sample))
        self._asked[scorer, digest] += 1
        return Question(self._step, scorer, digest, self._asked[scorer, digest] - 1, sample.id)

    def read(self, questions: Sequence[Question]) -> dict[Question, Score]:
        """The answers to those of the questions that were answered before. Raises ``RunError`` when the file cannot be read."""
        with self._opened() as connection:
            found = [(asked, connection.execute(_READ, _key(asked)).fetchone()) for asked in questions]
            return {asked: Score(**json.loads(row[0])) for asked, row in found if row}

    def write(self, answers: Mapping[Question, Score]) -> None:
        """Keep all of the answers, or none: when this returns they are on the disk. Raises ``RunError`` when the disk refuses."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [(*_key(asked), asked.sample_id, json.dumps(asdict(score), allow_nan=False), now) for asked, score in answers.items()]
        with self._opened() as connection, connection:
            connection.executemany(_WRITE, rows)

    def close(self) -> None:
        """Leave one file; it is opened again when it is needed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self._connection = _connect(self._path)
            yield self._connection
        except sqlite3.OperationalError as error:
            raise RunError(
                f"{self._path}, the journal of what was answered, cannot be used: {error}; "
                "what is in it is intact; repair this and run the same command again"
            ) from error
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise  # Nothing is wrong with the file.
            raise RunError(
                f"{self._path}, the journal of what was answered, is damaged: {error}; restore it, or move it away to have all asked again"
            ) from error


class _Kept:
    """A reward source that is asked only what the journal does not hold."""

    def __init__(self, source: RewardSource, journal: Journal, scorer: str) -> None:
        self._source, self._journal, self._scorer = source, journal, scorer

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One score a sample. What arrives is kept before the next is waited for; what nobody answered is not."""
        questions = self._journal.questions(self._scorer, samples)
        scores = self._journal.read(questions)
        asked = [(question, sample) for question, sample in zip(questions, samples, strict=True) if question not in scores]
        for answers in self._answers([sample for _, sample in asked]):
            arrived = {asked[answer.index][0]: answer for answer in answers}
            self._journal.write({question: answer.score for question, answer in arrived.items() if answer.answered})
            scores |= {question: answer.score for question, answer in arrived.items()}
        if len(scores) != len(questions):
            raise RunError(f"reward source {self._scorer} scored {len(scores)} of {len(questions)} samples; one score each is needed")
        return [scores[question] for question in questions]

    def _answers(self, samples: Sequence[Sample]) -> Iterator[Sequence[Answer]]:
        if not samples:
            return
        if isinstance(self._source, RewardService):
            batches: Iterator[Sequence[Answer]] = self._source.answers(samples)
        else:
            batches = iter([[Answer(i, score) for i, score in enumerate(self._source.score(samples))]])
        for batch in batches:
            for answer in batch:
                if not all(map(math.isfinite, [answer.score.value or 0.0, *answer.score.parts.values()])):
                    raise RunError(f"reward source {self._scorer} answered {answer.score}; allowed: finite numbers, or None for no verdict")
            yield batch


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_LOCK_SECONDS)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # committed is on the disk, also when the power fails
    connection.execute(_TABLE)
    return connection


def _key(asked: Question) -> tuple[int, str, str, int]:
    return asked.step, asked.scorer, asked.sample, asked.occurrence


def _seen(sample: Sample) -> str:
    """All that a source is shown of a sample, as text."""
    prompt = sample.prompt
    turns = [[message.role, message.content] for message in prompt.messages]
    seen: list[Any] = [prompt.id, sample.index, prompt.plain, turns, sample.response, sample.finished, dict(prompt.metadata)]
    return json.dumps(seen, sort_keys=True, default=repr)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
