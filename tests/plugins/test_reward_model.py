import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignkit.data.collate import collate
from alignkit.data.sources import FileConfig
from alignkit.errors import DataError, RunError, SettingError
from alignkit.interfaces import TokenBatch
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.models.scalar import ScalarModel, load_scalar
from alignkit.models.tiny import byte_codec
from alignkit.models.trunk import Kept
from alignkit.settings import Component
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, RankedRows, Ranking, Sample
from alignkit_reward_model import RewardModelConfig, plan, update
from alignkit_reward_model.cross_validation import labeler_groups, split
from alignkit_reward_model.normalization import normalization
from alignkit_reward_model.source import TrainedReward, scores_of
from alignkit_reward_model.update import RewardModel
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import Architecture, first_gradient, relative_distance, vivid_context

TINY = TinyLMConfig(hidden_size=32, layers=2, heads=2, positions=128)
CONFIG = RewardModelConfig(batch=4, learning_rate=3e-3, head_learning_rate=1e-2, epochs=8)
WORDS = ["good", "fine", "poor", "awful"]
CODEC = byte_codec()


def rankings(prompts: int = 6, labelers: Sequence[str] = ()) -> list[RankedRows]:
    """Each prompt with four answers, the kindest ranked first; labelers take turns."""
    made = [Prompt(str(i), (Message("user", f"film {i}"),)) for i in range(prompts)]
    answers, ranks = tuple(f"{word} film" for word in WORDS), (1, 2, 3, 4)
    by = [labelers[i % len(labelers)] if labelers else None for i in range(prompts)]
    return [CODEC.ranked(Ranking(prompt, answers, ranks, labeler=labeler)) for prompt, labeler in zip(made, by, strict=True)]


def make(
    folder: Path, config: RewardModelConfig = CONFIG, rows: Sequence[RankedRows] | None = None, policy: TinyLMConfig = TINY
) -> RewardModel:
    rows = rankings() if rows is None else rows
    return RewardModel(config, make_context(folder, plan=plan(config, len(rows)), rows=rows, policy=policy))


def reload(folder: Path) -> ScalarModel:
    return load_scalar(folder, tuning=TuningConfig(), precision="float32", trainable=False, seed=0)


def test_it_learns_the_ranking_and_scores_keep_it_after_save_and_load(tmp_path: Path) -> None:
    optimizer = make(tmp_path)
    rows = rankings()
    before = optimizer.validate(rows)
    for _ in range(12):
        optimizer.update(rows[:4])
    after = optimizer.validate(rows)
    assert after["loss/ranking_nats"] < 0.3 < before["loss/ranking_nats"]
    assert after["reward/accuracy"] > 0.95
    optimizer.save(tmp_path / "saved")
    source = TrainedReward(reload(tmp_path / "saved"), checks=True)
    prompt = Prompt("new", (Message("user", "film 9"),))
    values = [score.value for score in source.score([Sample(prompt, f"{word} film") for word in WORDS])]
    assert None not in values
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("change", "known"),
    [({"epochs": 1}, True), ({"epochs": 3, "normalize": "none"}, True), ({"epochs": 1, "normalize": "none"}, False)],
    ids=["an epoch and the scores that are normalised", "three epochs", "everything is read once"],
)
def test_frozen_layers_are_computed_once_for_all_that_reads_the_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], known: bool
) -> None:
    policy, rows, config = replace(TINY, tuning=TuningConfig(kind="lora", rank=4, top_layers=1)), rankings(), replace(CONFIG, **change)
    with monkeypatch.context() as patch:
        patch.setattr(update, "keep_states", lambda *_, **__: Kept(None, ()))
        plain = make(tmp_path, config, rows, policy)
    kept, seen = make(tmp_path, config, rows, policy), list[bool]()
    scores = kept._model.scores

    def noting(batch: TokenBatch) -> torch.Tensor:
        seen.append(batch.below is not None)
        return scores(batch)

    monkeypatch.setattr(kept._model, "scores", noting)
    for _ in range(3):
        assert kept.update(rows)["loss/ranking_nats"] == pytest.approx(plain.update(rows)["loss/ranking_nats"], rel=1e-5)
    for name, optimizer in (("plain", plain), ("kept", kept)):
        optimizer.save(tmp_path / name)
    assert reload(tmp_path / "kept").offset == pytest.approx(reload(tmp_path / "plain").offset, abs=1e-5)
    assert reload(tmp_path / "kept").gain == pytest.approx(reload(tmp_path / "plain").gain, rel=1e-4)
    assert set(seen[2:]) == {known}  # the first two are the check of padding


def test_a_run_that_goes_on_makes_the_same_of_its_frozen_layers(tmp_path: Path) -> None:
    policy, rows = replace(TINY, tuning=TuningConfig(kind="lora", rank=4, top_layers=1)), rankings()
    whole = make(tmp_path, policy=policy)
    for batch in (rows[:4], rows[2:], rows[1:5]):
        whole.update(batch)
    stopped = make(tmp_path, policy=policy)
    stopped.update(rows[:4])
    state = copy.deepcopy(stopped.state())
    resumed = make(tmp_path, policy=policy)
    resumed.load_state(state)
    for batch in (rows[2:], rows[1:5]):
        resumed.update(batch)
    expected, found = whole.state().tensors, resumed.state().tensors
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_standard_scores_of_the_ranked_responses_have_mean_zero_and_spread_one(tmp_path: Path, architecture: Architecture) -> None:
    optimizer = make(tmp_path, policy=replace(TINY, architecture=architecture))
    for _ in range(3):
        optimizer.update(rankings())
    optimizer.save(tmp_path / "saved")
    scores = reload(tmp_path / "saved").scores(collate([row for ranking in rankings() for row in ranking.rows]))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_5_demonstrations_score_zero_on_average_and_do_so_after_save_and_load(tmp_path: Path, architecture: Architecture) -> None:
    file = tmp_path / "demonstrations.jsonl"
    texts = ["a good film", "a fine film", "ok"]
    turns = [{"messages": [{"role": "user", "content": "film"}, {"role": "assistant", "content": text}]} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in turns))
    config = replace(CONFIG, normalize="demonstrations", demonstrations=Component("jsonl", FileConfig(path=str(file))))
    optimizer = make(tmp_path, config, policy=replace(TINY, architecture=architecture))
    optimizer.update(rankings())
    samples = [Sample(Prompt("p", (Message("user", "film"),)), text) for text in texts]

    def mean_score(model: ScalarModel) -> float:
        return sum(score.value or 0.0 for score in TrainedReward(model, checks=True).score(samples)) / len(samples)

    bare = mean_score(optimizer._model)
    assert abs(bare) > 1e-2
    optimizer.save(tmp_path / "one")
    assert mean_score(reload(tmp_path / "one")) == pytest.approx(0.0, abs=1e-4)
    # Only what is saved is shifted, and shifted once: what goes on training scores as before, and a second save is no second shift.
    assert mean_score(optimizer._model) == bare
    optimizer.save(tmp_path / "two")
    again = reload(tmp_path / "two")
    assert (again.offset, again.gain) == (reload(tmp_path / "one").offset, 1.0)
    again.save(tmp_path / "three")
    assert mean_score(reload(tmp_path / "three")) == pytest.approx(0.0, abs=1e-4)


def test_normalization_by_hand() -> None:
    assert normalization([1.0, 2.0, 6.0], scale=False) == (3.0, 1.0)
    assert normalization([1.0, 3.0], scale=True) == (2.0, 1.0)
    assert normalization([1.0, 5.0], scale=True) == (3.0, 0.5)
    assert normalization([4.0, 4.0], scale=True) == (4.0, 1.0)  # what does not vary has no unit


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"normalize": "demonstrations"}, "demonstrations: is missing; normalize: demonstrations needs it"),
        ({"demonstrations": Component("jsonl", FileConfig(path="x"))}, "demonstrations: is used by normalize: demonstrations alone"),
    ],
)
def test_demonstrations_are_given_where_they_are_used(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        RewardModelConfig(**wrong)


def unclipped(config: RewardModelConfig, folder: Path, architecture: Architecture) -> RewardModel:
    """The optimizer on a model whose scores differ, and whose gradients are seen as they are."""
    config = replace(config, clip_norm=1e9)
    return RewardModel(config, vivid_context(folder, architecture, plan(config, 8)))


def of_each_size() -> list[RankedRows]:
    """Rankings of four with a tie, of two, and of five: 5, 1 and 10 pairs."""
    prompts = [Prompt(str(i), (Message("user", f"film {i}"),)) for i in range(3)]
    ranks = [(2, 1, 2, 3), (2, 1), (3, 5, 1, 2, 4)]
    return [CODEC.ranked(Ranking(p, ("good", "fine", "ok", "poor", "bad")[: len(r)], r)) for p, r in zip(prompts, ranks, strict=True)]


def one_by_one(model: ScalarModel, ranking: RankedRows) -> list[tuple[float, float]]:
    """Score of the better and of the worse response of each pair, every response read alone."""
    scores = [scores_of(model, [row])[0] for row in ranking.rows]
    ranked = list(zip(ranking.ranks, scores, strict=True))
    return [(better, worse) for a, better in ranked for b, worse in ranked if a < b]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_2_the_loss_is_the_mean_over_a_prompts_pairs_and_then_over_prompts(tmp_path: Path, architecture: Architecture) -> None:
    """From scores read one by one, to 1e-6; two responses are the pairwise loss, and the order in which they are listed is nothing."""
    rows, turned = of_each_size(), [replace(row, rows=row.rows[::-1], ranks=row.ranks[::-1]) for row in of_each_size()]
    optimizer, other = (unclipped(CONFIG, tmp_path, architecture) for _ in range(2))
    pairs = [one_by_one(optimizer._model, ranking) for ranking in rows]
    assert [len(some) for some in pairs] == [5, 1, 10]
    by_prompt = [sum(math.log1p(math.exp(worse - better)) for better, worse in some) / len(some) for some in pairs]
    assert max(by_prompt) - min(by_prompt) > 1e-2
    for ranking, loss in zip(rows, by_prompt, strict=True):
        assert optimizer.validate([ranking])["loss/ranking_nats"] == pytest.approx(loss, abs=1e-6)
    assert optimizer.update(rows)["loss/ranking_nats"] == pytest.approx(sum(by_prompt) / 3, abs=1e-6)
    assert other.update(turned)["loss/ranking_nats"] == pytest.approx(sum(by_prompt) / 3, abs=1e-6)
    assert relative_distance(first_gradient(other.state()), first_gradient(optimizer.state())) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_3_only_differences_of_rewards_count_unless_they_are_centred(tmp_path: Path, architecture: Architecture) -> None:
    """The same number added to all rewards leaves loss and gradient as they are, to 1e-6; with ``center`` it is pulled back to 0."""
    rows = of_each_size()

    def shifted(by: float, center: float = 0.0) -> tuple[float, dict[str, torch.Tensor], list[tuple[float, float]]]:
        optimizer = unclipped(replace(CONFIG, center=center), tmp_path, architecture)
        torch.nn.init.constant_(optimizer._model.head.bias, by)
        pairs = one_by_one(optimizer._model, rows[2])
        return optimizer.update(rows[2:])["loss/ranking_nats"], first_gradient(optimizer.state()), pairs

    (loss, gradient, _), (other_loss, other, _) = shifted(0.0), shifted(1.0)
    assert other_loss == pytest.approx(loss, abs=1e-6)
    for name in gradient:
        assert torch.allclose(other[name], gradient[name], rtol=0.0, atol=1e-6), name
    _, pulled, pairs = shifted(1.0, center=0.1)
    # d/db of 0.1 * mean (r_w + b + r_l + b)^2
    assert float(pulled["head.bias"]) == pytest.approx(0.1 * 4 * sum(map(sum, pairs)) / len(pairs), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_3_equal_rewards_are_a_coin_toss_and_count_as_wrong(tmp_path: Path, architecture: Architecture) -> None:
    optimizer = unclipped(CONFIG, tmp_path, architecture)
    torch.nn.init.zeros_(optimizer._model.head.weight)
    figures = optimizer.validate(of_each_size())
    assert figures["loss/ranking_nats"] == pytest.approx(math.log(2.0), abs=1e-6)
    assert figures["reward/accuracy"] == 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_4_ties_teach_nothing_and_do_not_dilute_the_step(tmp_path: Path, architecture: Architecture) -> None:
    """No tied pair contributes a gradient."""
    policy = replace(TINY, architecture=architecture)
    alone, with_tie = make(tmp_path, policy=policy), make(tmp_path, policy=policy)
    rows = rankings(prompts=2)
    tie = replace(rows[1], ranks=(1, 1, 1, 1))
    first, second = alone.update(rows[:1]), with_tie.update([rows[0], tie])
    assert second["loss/ranking_nats"] == pytest.approx(first["loss/ranking_nats"])
    assert second["data/tied_rankings"] == 1.0
    for name, tensor in alone.state().tensors.items():
        assert torch.allclose(tensor, with_tie.state().tensors[name], atol=1e-7), name
    with pytest.raises(DataError, match="all rankings of a step are tied or weigh nothing"):
        alone.update([tie])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 200])
def test_the_step_does_not_depend_on_the_microbatch_size(tmp_path: Path, tokens: int, architecture: Architecture) -> None:
    policy = replace(TINY, architecture=architecture)
    whole, split_up = make(tmp_path, policy=policy), make(tmp_path, replace(CONFIG, microbatch_tokens=tokens), policy=policy)
    first, second = whole.update(rankings()[:4]), split_up.update(rankings()[:4])
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_4_one_forward_a_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: Architecture) -> None:
    optimizer = make(tmp_path, policy=replace(TINY, architecture=architecture))
    rows = rankings(prompts=3)
    optimizer.update(rows)  # the first step also looks whether padding changes a score
    seen: list[int] = []
    original = type(optimizer._model).forward
    monkeypatch.setattr(type(optimizer._model), "forward", lambda self, batch: seen.append(len(batch.ids)) or original(self, batch))
    optimizer.update(rows)
    assert sum(seen) == 3 * 4


def test_a_soft_label_belongs_to_the_first_response_whichever_is_ranked_better(tmp_path: Path) -> None:
    optimizer, prompt = make(tmp_path), Prompt("p", (Message("user", "film"),))
    one = CODEC.ranked(Ranking(prompt, ("good", "bad"), (1, 2), preference=0.8))
    turned = CODEC.ranked(Ranking(prompt, ("bad", "good"), (2, 1), preference=0.2))
    assert optimizer.validate([one])["loss/ranking_nats"] == pytest.approx(optimizer.validate([turned])["loss/ranking_nats"], rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_rm_1_neither_company_nor_order_nor_padding_changes_a_score(tmp_path: Path, architecture: Architecture) -> None:
    model = make(tmp_path, policy=replace(TINY, architecture=architecture))._model.requires_grad_(False)
    prompt = Prompt("p", (Message("user", "film"),))
    samples = [Sample(prompt, text) for text in ("a", "a much longer answer than the others", "middling", "")]
    source = TrainedReward(model, checks=True)
    together = [score.value for score in source.score(samples)]
    turned = [score.value for score in source.score(samples[::-1])][::-1]
    alone = [source.score([sample])[0].value for sample in samples]
    assert together == pytest.approx(turned, abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-5)
    # It is the head at the stop token, and there is nothing behind it that could be read in its place.
    row = CODEC.sample(samples[1])
    hidden = model.backbone(torch.tensor([row.ids])).last_hidden_state[0, -1]
    assert together[1] == pytest.approx(float(model.head(hidden)), abs=1e-5)


def test_a_reward_model_that_padding_disturbs_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(tmp_path)
    monkeypatch.setattr(type(optimizer._model), "scores", lambda self, batch: batch.ids.shape[1] * torch.ones(len(batch.ids)))
    with pytest.raises(RunError, match="padding changes the reward model's scores by 8"):
        optimizer.update(rankings())
    with pytest.raises(RunError, match="padding changes the reward model's scores by 8"):
        TrainedReward(optimizer._model, checks=True).score([Sample(Prompt("p", (Message("user", "film"),)), "x")])


def test_validation_tells_accuracy_by_labeler_and_by_gap_calibration_and_length(tmp_path: Path) -> None:
    optimizer = make(tmp_path)
    rows = rankings(labelers=("ann", "b/o"))
    for _ in range(12):
        optimizer.update(rows)
    figures = optimizer.validate(rows)
    by_labeler = [figures["reward/accuracy_labeler.ann"], figures["reward/accuracy_labeler.b_o"]]
    assert sum(by_labeler) / 2 == pytest.approx(figures["reward/accuracy"])
    shares = {name: value for name, value in figures.items() if name.startswith("reward/share_gap_")}
    assert sum(shares.values()) == pytest.approx(1.0)
    buckets = [figures[name.replace("share", "accuracy")] * share for name, share in shares.items()]
    assert sum(buckets) == pytest.approx(figures["reward/accuracy"])  # every prompt has as many pairs
    assert 0.0 <= figures["reward/calibration_error"] <= 0.5
    assert -1.0 <= figures["reward/length_correlation"] <= 1.0
    assert figures["reward/score_min"] < figures["reward/score_mean"] < figures["reward/score_max"]
    assert figures["reward/gap_mean"] > 0.0


def test_labelers_are_dealt_into_groups_of_about_as_many_rankings() -> None:
    rows = [replace(row, labeler=labeler) for row, labeler in zip(rankings(10), "aaaabbbccd", strict=True)]
    assert labeler_groups(rows, 2) == [("a", "d"), ("b", "c")]
    assert labeler_groups(rows, 4) == [("a",), ("b",), ("c",), ("d",)]


def test_a_fold_trains_on_nobody_it_is_measured_on() -> None:
    rows = rankings(40, labelers=("a", "b", "c"))
    fold = split(rows, ("b",))
    assert {row.labeler for row in fold.training} == {row.labeler for row in fold.same} == {"a", "c"}
    assert {row.labeler for row in fold.other} == {"b"}
    ids = [row.id for part in (fold.training, fold.same, fold.other) for row in part]
    assert sorted(ids) == sorted(row.id for row in rows)


def test_cross_validation_trains_a_model_a_fold_and_is_saved_with_the_model(tmp_path: Path) -> None:
    # Labeler "x" ranks the other way round: whoever learns from the rest predicts x wrongly, and the others rightly.
    rows = [replace(row, ranks=(4, 3, 2, 1)) if row.labeler == "x" else row for row in rankings(44, labelers=("a", "b", "c", "x"))]
    config = replace(CONFIG, cross_validate="labeler", folds=4, epochs=2)
    optimizer = make(tmp_path, config, rows)
    optimizer.save(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "cross_validation.json").read_text())
    assert [fold["held_out"] for fold in found["folds"]] == [["a"], ["b"], ["c"], ["x"]]
    assert all(fold["rankings_trained"] + fold["rankings_same"] + fold["rankings_other"] == 44 for fold in found["folds"])
    (strange,) = (fold for fold in found["folds"] if fold["held_out"] == ["x"])
    assert strange["accuracy_other"] < 0.2 < 0.8 < strange["accuracy_same"]
    others = [fold["accuracy_other"] for fold in found["folds"]]
    mean = sum(others) / 4
    error = (sum((value - mean) ** 2 for value in others) / 3 / 4) ** 0.5
    assert found["other_labelers"] == {"accuracy_mean": pytest.approx(mean), "accuracy_standard_error": pytest.approx(error)}


@pytest.mark.parametrize(
    ("labelers", "message"),
    [((), "6 of 6 have no `labeler`; add the column"), (("a", "b"), "there are 2, and folds is 5; lower it")],
)
def test_cross_validation_without_labelers_is_refused_before_any_training(tmp_path: Path, labelers: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(tmp_path, replace(CONFIG, cross_validate="labeler"), rankings(labelers=labelers))
