"""The report of a made-up run: what it must say, and that nothing missing or broken keeps it from being written."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from alignkit.errors import RunError
from alignkit.report import summary_table, view, write_curves, write_report
from alignkit.report.read import read_run
from alignkit.report.svg import Scale, Series, line_chart, moving_average, number
from tests.made_up_run import EVALUATION, write_run


def rendered(folder: Path) -> str:
    console = Console(width=120, record=True, file=(folder / "console.txt").open("w"))
    console.print(summary_table(folder))
    return console.export_text()


def test_the_report_is_one_file_with_headline_curves_and_samples(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path)).read_text()
    for words in ("78%", "95% interval 72% to 83%", "0.157 → 0.544", "12.4", "orders 71% of 117,929 pairs as people do", "creativity"):
        assert words in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert page.count("<svg") > 20


def test_text_from_models_is_escaped(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path)).read_text()
    assert "is &lt;b&gt;dull&lt;/b&gt; &amp; a bit of a mess." in page
    assert "<b>dull" not in page


def test_a_killed_run_shows_what_there_is(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, finished=False))
    assert [stage.name for stage in run.stages] == ["sft", "reward", "ppo"]
    assert len(run.stages[2].metrics[view.REWARD]) == 7  # the half line of step 8 is left out
    assert run.comparison == {}
    page = write_report(tmp_path).read_text()
    assert "not finished" in page
    assert "win rate" not in page
    assert "artifacts" in rendered(tmp_path)


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "sft" / "metrics.jsonl").write_text("\n".join([lines[0], "{oops", lines[2]]))
    with pytest.raises(RunError, match=r"sft/metrics\.jsonl:2: not a line of JSON"):
        write_report(tmp_path)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run: there is no run\.json in it"):
        write_report(tmp_path)


def test_figures_that_could_not_be_computed_are_dashes(tmp_path: Path) -> None:
    write_run(tmp_path)
    nothing = {name: None if isinstance(value, float) else value for name, value in EVALUATION.items()}
    (tmp_path / "compare" / "evaluation.json").write_text(json.dumps(nothing))
    assert "– → –" in write_report(tmp_path).read_text()
    assert "beats sft on –" in rendered(tmp_path)


def test_another_kind_of_evaluation_is_a_table(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "compare" / "evaluation.json").write_text('{"perplexity": 31.42, "texts": 400}')
    assert view.other_figures(read_run(tmp_path)) == [("compare", {"perplexity": "31.4", "texts": "400"})]
    assert "perplexity" in write_report(tmp_path).read_text()


TEXT_LOSS = {
    "text_loss": [
        {"policy": "sft", "loss_nats": 3.6148, "loss_ci95_low_nats": 3.5, "loss_ci95_high_nats": 3.7,
         "difference_nats": 0.0, "difference_ci95_low_nats": 0.0, "difference_ci95_high_nats": 0.0},
        {"policy": "ppo", "loss_nats": 3.701, "loss_ci95_low_nats": 3.6, "loss_ci95_high_nats": 3.8,
         "difference_nats": 0.0862, "difference_ci95_low_nats": -0.004, "difference_ci95_high_nats": 0.17},
    ],
    "documents": 150, "tokens": 11321, "data": "jsonl",
}  # fmt: skip


def test_the_loss_of_held_out_text_is_a_table_of_policies(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "reward" / "evaluation.json").write_text(json.dumps(TEXT_LOSS))
    (found,) = view.text_losses(read_run(tmp_path))
    assert found.text == "nats per token; 150 documents, 11,321 tokens"
    assert found.rows == [("sft", "3.615", ""), ("ppo", "3.701", "+0.086 (−0.004 to +0.170)")]
    for shown in (write_report(tmp_path).read_text(), rendered(tmp_path)):
        for words in ("11,321 tokens", "difference to sft", "3.615", "+0.086 (−0.004 to +0.170)"):
            assert words in shown
    assert view.other_figures(read_run(tmp_path)) == []
    assert "beats sft on 78%" in rendered(tmp_path)  # the comparison has its place still


def test_a_text_loss_that_could_not_be_computed_is_dashes(tmp_path: Path) -> None:
    write_run(tmp_path)
    nothing = [{name: value if name == "policy" else None for name, value in entry.items()} for entry in TEXT_LOSS["text_loss"]]
    (tmp_path / "compare" / "evaluation.json").write_text(json.dumps(TEXT_LOSS | {"text_loss": nothing}))
    assert view.text_losses(read_run(tmp_path))[0].rows == [("sft", "–", ""), ("ppo", "–", "– (– to –)")]
    assert "– (– to –)" in write_report(tmp_path).read_text()


def test_of_several_win_rates_the_last_is_the_headline_and_the_others_are_tables(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "reward" / "evaluation.json").write_text(json.dumps(EVALUATION | {"candidate": "one", "win_rate": 0.625}))
    ((name, figures),) = view.other_figures(read_run(tmp_path))
    assert (name, figures["win_rate"], figures["prompts"]) == ("reward: one over sft", "0.625", "200")
    page = write_report(tmp_path).read_text()
    assert "win rate, ppo over sft" in page
    assert "reward: one over sft" in page


def test_validation_lies_over_training_and_times_share_a_chart(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in read_run(write_run(tmp_path)).stages}
    main, others = view.charts(stages["sft"])
    assert [chart.name for chart in main] == ["loss / nll"]
    assert "held out" in main[0].svg
    assert [chart.name for chart in others] == ["optimizer / grad norm", "optimizer / learning rate", "time / per step"]
    main, others = view.charts(stages["ppo"])
    assert [chart.name for chart in main][:4] == ["reward / score", "kl / sequence", "response / length", "policy / entropy"]
    assert (main[1].unit, main[2].unit) == ("nats", "tokens")
    assert all(word in others[-1].svg for word in ("rollout", "update"))


def test_what_is_not_a_number_is_no_point(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in read_run(write_run(tmp_path)).stages}
    assert "optimizer/grad_norm" not in stages["reward"].metrics
    assert view.frontier(stages["sft"]) is None
    assert view.frontier(stages["ppo"]) is not None


def test_data_counts_come_from_the_manifests(tmp_path: Path) -> None:
    counts = view.data_counts(read_run(write_run(tmp_path)).stages)
    assert counts[0] == ("sft", "training", {"found": "1,000", "kept": "998", "dropped": "2", "truncated": "0"})


def test_the_terminal_shows_before_and_after_and_where_things_are(tmp_path: Path) -> None:
    text = rendered(write_run(tmp_path))
    assert "ppo beats sft on 78% of 200 held-out prompts (95% interval 72% to 83%); judge: lexicon_sentiment" in text
    assert "is a delight, warm and wise." in text
    assert "1 min 34 s" in text


def test_the_picture_for_a_readme_is_a_whole_svg(tmp_path: Path) -> None:
    picture = write_curves(write_run(tmp_path), tmp_path / "curves.svg")
    root = ET.fromstring(picture.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall("{http://www.w3.org/2000/svg}svg")) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"config": {"stages": []}}')
    with pytest.raises(RunError, match="no stage of this run has reward/score_mean"):
        write_curves(tmp_path / "other", picture)


def test_charts_are_well_formed_at_the_edges() -> None:
    for points in ([(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(float(i), -1e-9 * i) for i in range(50)], [(1.0, 1e7), (2.0, 3e7)]):
        ET.fromstring(line_chart([Series("a & b", points)], title="<edge>"))


def test_ticks_are_round_and_steps_are_whole() -> None:
    assert [label for _, label in Scale(0.03, 1.07, 0, 100).ticks(5)] == ["0.5", "1.0"]
    assert [label for _, label in Scale(0.03, 0.97, 0, 100).ticks(5)] == ["0.2", "0.4", "0.6", "0.8"]
    assert [label for _, label in Scale(1, 3, 0, 100, apart=1.0).ticks(5)] == ["1", "2", "3"]


def test_a_moving_average_keeps_the_length_and_short_curves_stay() -> None:
    line = [(float(i), float(i)) for i in range(48)]
    assert moving_average(line)[10] == (10.0, 10.0)
    assert len(moving_average(line)) == 48
    assert moving_average(line[:20]) == line[:20]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (-1.5, "−1.50"),
        (117929, "117,929"),
        (12.41, "12.4"),
        (3e-5, "3.00e−5"),
    ],
)
def test_numbers_are_for_people(value: float | None, words: str) -> None:
    assert number(value) == words


def test_durations_are_for_people() -> None:
    assert [view.duration(seconds) for seconds in (None, 4.25, 41.0, 71.2, 7512.0)] == ["–", "4.2 s", "41 s", "1 min 11 s", "2 h 05 min"]


def test_what_the_guards_found_is_told_once_and_marked_on_its_curve(tmp_path: Path) -> None:
    write_run(tmp_path)
    told = {"event": "guard", "stage": "ppo", "step": 12, "what": "length", "figure": 0.71, "text": "the reward may be <measuring> length"}
    events = [{"event": "stage started", "stage": "ppo"}, told, {**told, "time": "later"}]  # told again by a run that went on
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "gu')
    run = read_run(tmp_path)
    assert [(one.stage, one.step, one.what, one.figure) for one in run.warnings] == [("ppo", 12, "length", 0.71)]
    page = write_report(tmp_path).read_text()
    assert page.count("the reward may be &lt;measuring&gt; length") == 1
    assert page.count('class="mark warned"') == 1
    assert "length at 12" in page


def test_a_run_without_warnings_has_no_such_section(tmp_path: Path) -> None:
    assert "Warnings" not in write_report(write_run(tmp_path)).read_text()
