from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignkit.errors import DataError
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, RankedRows, Ranking, Sample
from alignkit_reward_model import RewardModelConfig, plan
from alignkit_reward_model.source import TrainedReward
from alignkit_reward_model.update import RewardModel

TINY = TinyLMConfig(hidden_size=32, layers=2, heads=2, positions=128)
CONFIG = RewardModelConfig(batch=4, learning_rate=3e-3, head_learning_rate=1e-2, epochs=8)
WORDS = ["good", "fine", "poor", "awful"]


def rankings(optimizer: RewardModel, prompts: int = 6) -> list[RankedRows]:
    """Each prompt with four answers, the kindest ranked first."""
    codec = optimizer._model.codec
    made = [Prompt(str(i), (Message("user", f"film {i}"),)) for i in range(prompts)]
    return [codec.ranked(Ranking(prompt, tuple(f"{word} film" for word in WORDS), (1, 2, 3, 4))) for prompt in made]


def make(folder: Path, config: RewardModelConfig = CONFIG) -> RewardModel:
    return RewardModel(config, make_context(folder, plan=plan(config, 6), policy=TINY))


def test_it_learns_the_ranking_and_scores_keep_it_after_save_and_load(tmp_path: Path) -> None:
    optimizer = make(tmp_path)
    rows = rankings(optimizer)
    before = optimizer.validate(rows)
    for _ in range(12):
        optimizer.update(rows[:4])
    after = optimizer.validate(rows)
    assert after["loss/ranking_nats"] < 0.3 < before["loss/ranking_nats"]
    assert after["reward/accuracy"] > 0.95
    optimizer.save(tmp_path / "saved")
    source = TrainedReward(load_scalar(tmp_path / "saved", tuning=TuningConfig(), precision="float32", trainable=False, seed=0))
    prompt = Prompt("new", (Message("user", "film 9"),))
    values = [score.value for score in source.score([Sample(prompt, f"{word} film") for word in WORDS])]
    assert None not in values
    assert values == sorted(values, reverse=True)


def test_saved_scores_are_on_the_scale_that_normalize_promises(tmp_path: Path) -> None:
    optimizer = make(tmp_path)
    rows = rankings(optimizer)
    for _ in range(40):
        optimizer.update(rows)
    optimizer.save(tmp_path / "saved")
    model = load_scalar(tmp_path / "saved", tuning=TuningConfig(), precision="float32", trainable=False, seed=0)
    scores = torch.cat([optimizer._scores([ranking])[0] for ranking in rows]).flatten()
    normal = (scores - model.offset + 0.0) * 1.0 if model.gain == 1.0 else scores
    assert abs(float(normal.mean())) < 0.5
    assert 0.5 < float(normal.std()) < 2.0


def test_ties_teach_nothing_and_do_not_dilute_the_step(tmp_path: Path) -> None:
    alone, with_tie = make(tmp_path), make(tmp_path)
    rows = rankings(alone, prompts=2)
    tie = replace(rows[1], ranks=(1, 1, 1, 1))
    first, second = alone.update(rows[:1]), with_tie.update([rows[0], tie])
    assert second["loss/ranking_nats"] == pytest.approx(first["loss/ranking_nats"])
    assert second["data/tied_rankings"] == 1.0
    for name, tensor in alone.state().tensors.items():
        assert torch.allclose(tensor, with_tie.state().tensors[name], atol=1e-7), name
    with pytest.raises(DataError, match="all rankings of a step are tied or weigh nothing"):
        alone.update([tie])


@pytest.mark.parametrize("tokens", [1, 200])
def test_the_step_does_not_depend_on_the_microbatch_size(tmp_path: Path, tokens: int) -> None:
    whole, split = make(tmp_path), make(tmp_path, replace(CONFIG, microbatch_tokens=tokens))
    rows = rankings(whole)
    first, second = whole.update(rows[:4]), split.update(rows[:4])
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4), name


def test_one_forward_a_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(tmp_path)
    seen: list[int] = []
    original = type(optimizer._model).forward
    monkeypatch.setattr(type(optimizer._model), "forward", lambda self, ids: seen.append(len(ids)) or original(self, ids))
    optimizer.update(rankings(optimizer, prompts=3))
    assert sum(seen) == 3 * 4


def test_a_soft_label_belongs_to_the_first_response_whichever_is_ranked_better(tmp_path: Path) -> None:
    optimizer = make(tmp_path)
    codec, prompt = optimizer._model.codec, Prompt("p", (Message("user", "film"),))
    one = codec.ranked(Ranking(prompt, ("good", "bad"), (1, 2), preference=0.8))
    turned = codec.ranked(Ranking(prompt, ("bad", "good"), (2, 1), preference=0.2))
    assert optimizer.validate([one])["loss/ranking_nats"] == pytest.approx(optimizer.validate([turned])["loss/ranking_nats"], rel=1e-5)


def test_the_score_of_a_batch_is_the_score_of_each(tmp_path: Path) -> None:
    """I-RM-1: neither company nor order nor padding changes a score."""
    source = TrainedReward(make(tmp_path)._model.requires_grad_(False))
    prompt = Prompt("p", (Message("user", "film"),))
    samples = [Sample(prompt, text) for text in ("a", "a much longer answer than the others", "middling", "")]
    together = [score.value for score in source.score(samples)]
    turned = [score.value for score in source.score(samples[::-1])][::-1]
    alone = [source.score([sample])[0].value for sample in samples]
    assert together == pytest.approx(alone, abs=1e-5)
    assert turned == pytest.approx(alone, abs=1e-5)
