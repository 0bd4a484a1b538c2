"""The lexicon reward: known texts, and what happens at the edges."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignkit.api import Message, Prompt, RunError, Sample
from alignkit_lexicon import register_rewards
from alignkit_lexicon.sentiment import SentimentConfig, SentimentReward, read
from alignkit_lexicon.toxicity import ToxicityConfig, ToxicityReward


def sample(response: str, asked: str = "The film is", plain: bool = True) -> Sample:
    return Sample(Prompt("1", (Message("user", asked),), plain=plain), response)


def test_praise_scores_above_blame_and_silence_has_no_score() -> None:
    praise, blame, silence = SentimentReward(SentimentConfig()).score([sample(" wonderful."), sample(" a boring mess."), sample("  ")])
    assert praise.value == pytest.approx(0.5719)  # "wonderful" has valence 2.7: 2.7 / sqrt(2.7**2 + 15)
    assert blame.value is not None
    assert blame.value < 0 < praise.parts["positive_share"]
    assert (silence.value, silence.reason) == (None, "the response is empty")


def test_scale_multiplies() -> None:
    once, thrice = (SentimentReward(SentimentConfig(scale=scale)).score([sample(" wonderful.")])[0].value for scale in (1.0, 3.0))
    assert once is not None
    assert thrice == pytest.approx(3 * once)


def test_the_prompt_counts_only_where_the_conversation_is_read() -> None:
    awful_start = [sample(" but it ends.", asked="An awful, hateful disaster")]
    alone = SentimentReward(SentimentConfig(text="response")).score(awful_start)[0].value
    whole = SentimentReward(SentimentConfig(text="conversation")).score(awful_start)[0].value
    assert alone == 0.0
    assert whole is not None
    assert whole < -0.5


def test_a_plain_prompt_runs_on_and_a_chat_stands_on_two_lines() -> None:
    assert read(sample(" fun."), "conversation") == "The film is fun."
    assert read(sample("Fun.", asked="How is it?", plain=False), "conversation") == "How is it?\nFun."


def test_a_word_of_the_list_is_found_in_disguise_and_not_within_other_words() -> None:
    said = ["A fine film.", "What a shitty film!", "sh1t happens", "The assassin sings a classic in Scunthorpe."]
    assert [score.value for score in ToxicityReward(ToxicityConfig()).score([sample(text) for text in said])] == [0.0, -1.0, -1.0, 0.0]


def test_a_missing_list_of_words_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "better_profanity", None)
    with pytest.raises(RunError, match="pip install better-profanity"):
        ToxicityReward(ToxicityConfig())


def test_a_missing_package_is_an_error_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RunError, match=r'pip install "alignkit\[lexicon\]"'):
        SentimentReward(SentimentConfig())


def test_the_declaration_is_torch_free() -> None:
    code = "import sys, alignkit_lexicon; sys.exit(bool({'torch', 'vaderSentiment', 'better_profanity'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert [spec.kind for spec in register_rewards()] == ["lexicon_sentiment", "lexicon_toxicity"]
