"""What ``alignkit data preview`` shows: trained tokens marked, special tokens and line ends visible, nothing that commands the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from alignkit.cli import cli
from alignkit.config import load_config
from alignkit.data.encode import encode_demonstrations, encode_prompts, encode_rankings
from alignkit.data.preview import in_brackets, in_colour, preview, render
from alignkit.errors import ConfigError, DataError
from alignkit.registry import find_plugins
from alignkit.types import Demonstration, Message, Ranking
from tests.data.chat import ask, codec, plain, turns

CODEC = codec()
SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


def test_a_conversation_with_its_trained_turns() -> None:
    demonstration = Demonstration(ask("Hi", "d"), turns("Hello!", "And?", "Bye\nbye.", first="assistant"))
    found = encode_demonstrations(CODEC, [demonstration], max_length=200, overlong="error")
    # Headers 2 * 6 + 2 * 11, texts 2 + 6 + 4 + 8, ends 4, newlines between turns 3.
    assert render(CODEC, found.rows, found.report.as_json(), mark=in_brackets) == (
        "1 kept, 0 truncated, 0 dropped as too long; 61 tokens, the longest row has 61\n\n"
        "⟦trained⟧ tokens are marked; ⏎ is the end of a line\n\n"
        "--- 1: d, 16 of 61 tokens trained\n"
        "<|im_start|>user⏎\nHi<|im_end|>⏎\n"
        "<|im_start|>assistant⏎\n⟦Hello!<|im_end|>⟧⏎\n"
        "<|im_start|>user⏎\nAnd?<|im_end|>⏎\n"
        "<|im_start|>assistant⏎\n⟦Bye⏎\nbye.<|im_end|>⟧"
    )


def test_a_ranking_best_response_first_with_what_is_said_about_it() -> None:
    ranking = Ranking(plain("The film", "r"), (" was bad.", " was good."), (2, 1), labeler="kim", preference=0.25)
    found = encode_rankings(CODEC, [ranking], max_length=200, overlong="error")
    assert render(CODEC, found.rows, found.report.as_json(), mark=in_brackets).split("\n\n")[2] == (
        "--- 1: r, 2 responses after 8 tokens, labeler kim, preference 0.25\n"
        "The film\n"
        "  rank 1, 11 tokens: ⟦ was good.<|im_end|>⟧\n"
        "  rank 2, 10 tokens: ⟦ was bad.<|im_end|>⟧"
    )


def test_a_prompt_and_that_it_was_cut() -> None:
    found = encode_prompts(CODEC, [plain("abcdef")], max_length=4, overlong="truncate")
    shown = render(CODEC, found.rows, found.report.as_json(), mark=in_brackets)
    assert shown.startswith("0 kept, 1 truncated, 0 dropped")
    assert shown.endswith("--- 1: p, 4 tokens, truncated\ncdef")


def test_text_cannot_command_the_terminal() -> None:
    found = encode_demonstrations(
        CODEC, [Demonstration(plain("a\x1b[2Jb\tc\r"), (Message("assistant", "d"),))], max_length=50, overlong="error"
    )
    assert render(CODEC, found.rows, found.report.as_json(), mark=in_brackets).endswith("a\\x1b[2Jb\tc\\x0d⟦d<|im_end|>⟧")


def test_colour_is_beside_the_brackets_and_ends_with_each_line() -> None:
    assert in_colour("ab\n\ncd") == "\x1b[32m⟦ab\x1b[0m\n\n\x1b[32mcd⟧\x1b[0m"


@pytest.mark.parametrize(("no_colour", "code"), [(None, "\x1b[32m⟦"), ("1", "is⟦")])
def test_a_terminal_gets_colour_unless_it_asks_for_none(monkeypatch: pytest.MonkeyPatch, no_colour: str | None, code: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr("sys.stdout", Terminal())
    registry = find_plugins()
    shown = preview(load_config(SMOKE, (), registry), registry, "sft", 1)
    assert code in shown
    assert ("\x1b" in shown) == (no_colour is None)


@pytest.mark.parametrize(("stage", "first"), [("sft", "32 demonstrations"), ("reward", "32 rankings"), ("ppo", "24 prompts")])
def test_a_stage_of_a_config(stage: str, first: str) -> None:
    registry = find_plugins()
    shown = preview(load_config(SMOKE, (), registry), registry, stage, 2)
    assert shown.startswith(f"stage {stage}: {first}, at most 512 tokens\n")
    assert "--- 2: " in shown
    assert "--- 3: " not in shown


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("compare", 'stage "compare" evaluates, so it has no data to show; stages that learn: sft, reward, ppo'),
        ("rewrad", 'there is no stage "rewrad" (did you mean "reward"?); stages that learn: sft, reward, ppo'),
        ("x", 'there is no stage "x"; stages that learn: sft, reward, ppo'),
    ],
)
def test_a_stage_that_has_no_rows_is_an_error_that_lists_those_that_do(stage: str, message: str) -> None:
    registry = find_plugins()
    with pytest.raises(ConfigError) as caught:
        preview(load_config(SMOKE, (), registry), registry, stage, 2)
    assert str(caught.value) == f"{SMOKE}: {message}"


def told(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["data", "preview", str(SMOKE), *arguments], prog_name="alignkit")
    assert result.exit_code == 0, result.output
    return result.output


def test_the_documentation_shows_what_the_command_shows() -> None:
    document = (SMOKE.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"$ alignkit data preview configs/smoke.yaml sft --rows 1\n{told('sft', '--rows', '1')}```\n" in document
    assert f"```\n--- 1: r0{told('reward', '--rows', '1').split('--- 1: r0')[1]}```\n" in document


def test_the_command_shows_what_is_trained_what_is_ranked_and_what_became_of_the_rows() -> None:
    # The first demonstration is "The ending is" (13 tokens) with " warm." (6) and the stop token.
    assert told("sft", "--rows", "1") == (
        "stage sft: 32 demonstrations, at most 512 tokens\n"
        "32 kept, 0 truncated, 0 dropped as too long; 684 tokens, the longest row has 27\n\n"
        "⟦trained⟧ tokens are marked; ⏎ is the end of a line\n\n"
        "--- 1: d0, 7 of 20 tokens trained\nThe ending is⟦ warm.<|im_end|>⟧\n"
    )
    assert "  rank 1, 7 tokens: ⟦ bold.<|im_end|>⟧\n  rank 1, 9 tokens: ⟦ bright.<|im_end|>⟧\n  rank 2, " in told("reward")
    assert "--- 1: p35, 13 tokens\nHis ending is\n" in told("ppo")


def test_the_command_tells_a_misspelt_stage_and_exits_with_2() -> None:
    result = CliRunner().invoke(cli, ["data", "preview", str(SMOKE), "sfd"], prog_name="alignkit")
    assert (result.exit_code, 'there is no stage "sfd" (did you mean "sft"?)' in result.stderr) == (2, True)


def test_a_row_that_a_run_would_refuse_is_refused() -> None:
    registry = find_plugins()
    with pytest.raises(DataError, match="more than max_length 5; raise max_length"):
        preview(load_config(SMOKE, ("sft.max_length=5",), registry), registry, "sft", 2)
