"""The lexicon reward: known texts, and what happens at the edges."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignkit.api import Message, Prompt, RunError, Sample
from alignkit_lexicon import LexiconConfig, LexiconReward, read, register_rewards


def sample(response: str, asked: str = "The film is", plain: bool = True) -> Sample:
    return Sample(Prompt("1", (Message("user", asked),), plain=plain), response)


def test_praise_scores_above_blame_and_silence_has_no_score() -> None:
    praise, blame, silence = LexiconReward(LexiconConfig()).score([sample(" wonderful."), sample(" a boring mess."), sample("  ")])
    assert praise.value == pytest.approx(0.5719)  # "wonderful" has valence 2.7: 2.7 / sqrt(2.7**2 + 15)
    assert blame.value is not None
    assert blame.value < 0 < praise.parts["positive_share"]
    assert (silence.value, silence.reason) == (None, "the response is empty")


def test_scale_multiplies() -> None:
    once, thrice = (LexiconReward(LexiconConfig(scale=scale)).score([sample(" wonderful.")])[0].value for scale in (1.0, 3.0))
    assert once is not None
    assert thrice == pytest.approx(3 * once)


def test_the_prompt_counts_only_where_the_conversation_is_read() -> None:
    awful_start = [sample(" but it ends.", asked="An awful, hateful disaster")]
    alone = LexiconReward(LexiconConfig(text="response")).score(awful_start)[0].value
    whole = LexiconReward(LexiconConfig(text="conversation")).score(awful_start)[0].value
    assert alone == 0.0
    assert whole is not None
    assert whole < -0.5


def test_a_plain_prompt_runs_on_and_a_chat_stands_on_two_lines() -> None:
    assert read(sample(" fun."), "conversation") == "The film is fun."
    assert read(sample("Fun.", asked="How is it?", plain=False), "conversation") == "How is it?\nFun."


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RunError, match=r'pip install "alignkit\[lexicon\]"'):
        LexiconReward(LexiconConfig())


def test_the_declaration_is_torch_free() -> None:
    code = "import sys, alignkit_lexicon; sys.exit('torch' in sys.modules or 'vaderSentiment' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert [spec.kind for spec in register_rewards()] == ["lexicon_sentiment"]
