"""The loss of held-out text: by hand on fakes, against plain transformers in float64, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignkit.config import load_config
from alignkit.data.sources import DATA_SPECS, FileConfig
from alignkit.errors import ConfigError, DataError
from alignkit.evaluate import TextLossConfig
from alignkit.evaluate.text_loss import TextLoss, scored_texts
from alignkit.interfaces import Row, TokenBatch, TokenScores
from alignkit.models.causal_lm import load
from alignkit.models.config import TuningConfig
from alignkit.models.tiny import byte_codec
from alignkit.registry import find_plugins
from alignkit.settings import Component
from alignkit.types import Document
from tests.fakes import tiny_folder

CODEC = byte_codec()
B = CODEC.text("b")[0]


class FakePolicy:
    """The letter b has one log-probability, every other token another."""

    codec = CODEC

    def __init__(self, b: float, other: float) -> None:
        self._b, self._other = b, other

    def score_tokens(self, batch: TokenBatch, *, temperature: float = 1.0) -> TokenScores:
        assert temperature == 1.0
        logprobs = torch.where(batch.ids == B, self._b, self._other) * batch.loss_mask
        return TokenScores(logprobs, logprobs)


def rows(*texts: str) -> list[Row]:
    return [Row({"text": text}, f"text.jsonl:{i}") for i, text in enumerate(texts, start=1)]


def config(data: list[Row], *policies: str) -> TextLossConfig:
    return TextLossConfig(policies=policies, data=Component("rows", data), bootstrap=200)


def evaluate(chosen: TextLossConfig, policies: dict[str, Any]) -> dict[str, Any]:
    context: Any = SimpleNamespace(
        seed=0,
        load_policy=lambda stage, trainable: policies[stage],
        build_data=lambda component: SimpleNamespace(rows=lambda: component.config),
        say=lambda text: None,
    )
    return dict(TextLoss(chosen, context).evaluate())


def test_the_loss_is_the_mean_over_tokens_and_the_difference_is_to_the_first() -> None:
    found = evaluate(
        config(rows("abbb", "ac"), "sft", "ppo"), {"sft": FakePolicy(b=-1.0, other=-3.0), "ppo": FakePolicy(b=-2.0, other=-4.0)}
    )
    # The first letters have nothing before them: b, b, b and c are scored. (1 + 1 + 1 + 3) / 4, and each token a nat more.
    before, after = found["text_loss"]
    assert (before["policy"], before["loss_nats"], before["difference_nats"]) == ("sft", 1.5, 0.0)
    assert (after["policy"], after["loss_nats"], after["difference_nats"]) == ("ppo", 2.5, 1.0)
    assert (after["difference_ci95_low_nats"], after["difference_ci95_high_nats"]) == (1.0, 1.0)
    # Resampled, the two documents may both be the one (1 nat a token) or both the other (3).
    assert (before["loss_ci95_low_nats"], before["loss_ci95_high_nats"]) == (1.0, 3.0)
    assert (found["documents"], found["tokens"], found["data"]) == (2, 4, "rows")
    json.dumps(found, allow_nan=False)


def test_a_policy_that_cannot_be_read_has_no_loss() -> None:
    (entry,) = evaluate(config(rows("ab"), "ppo"), {"ppo": FakePolicy(b=float("nan"), other=0.0)})["text_loss"]
    assert entry == {"policy": "ppo"} | {key: None for key in entry if key != "policy"}


@pytest.mark.parametrize(
    ("text", "scored"),
    [
        ("abcdefg", "bc ef"),  # abc, def, and g with the stop token, in which nothing is left to score
        ("abcde", "bc e"),  # abc, de with the stop token
        ("abc", "bc"),  # abc, and the stop token alone
    ],
)
def test_the_first_token_of_a_piece_and_the_stop_token_are_not_scored(text: str, scored: str) -> None:
    (chunks,) = scored_texts(CODEC, [Document("1", text)], max_length=3)
    read = [CODEC.shown([i for i, counts in zip(chunk.ids, chunk.loss_mask, strict=True) if counts]) for chunk in chunks]
    assert " ".join(read) == scored


def test_a_document_of_one_token_is_left_out_and_not_counted() -> None:
    found = evaluate(config(rows("a", "ab", "b"), "ppo"), {"ppo": FakePolicy(b=-2.0, other=0.0)})
    assert (found["documents"], found["tokens"], found["text_loss"][0]["loss_nats"]) == (1, 1, 2.0)


def test_the_loss_is_what_plain_transformers_computes_in_float64() -> None:
    texts = ["The sea was calm.", "A lighthouse stood on the rocks, white and old.", "No."]
    policies = {
        name: load(tiny_folder(seed=seed), tuning=TuningConfig(), precision="float32", trainable=False, seed=0)
        for name, seed in (("sft", 0), ("ppo", 1))
    }
    found = evaluate(config(rows(*texts), "sft", "ppo"), policies)["text_loss"]
    expected = []
    for seed in (0, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder(seed=seed), dtype=torch.float64)
        nats = []
        for text in texts:
            ids = torch.tensor([policies["sft"].codec.tokenizer(text).input_ids])
            with torch.no_grad():
                logs = torch.log_softmax(model(ids).logits, dim=-1)
            nats += [-logs[0, i - 1, ids[0, i]].item() for i in range(1, ids.shape[1])]
        assert len(nats) == sum(map(len, texts)) - 3  # one token a byte
        expected.append(sum(nats) / len(nats))
    assert [entry["loss_nats"] for entry in found] == pytest.approx(expected, rel=1e-6)
    assert found[1]["difference_nats"] == pytest.approx(expected[1] - expected[0], abs=1e-6)
    assert found[1]["difference_ci95_low_nats"] <= found[1]["difference_nats"] <= found[1]["difference_ci95_high_nats"]


def test_a_row_without_text_is_named() -> None:
    with pytest.raises(DataError, match=r"text\.jsonl:2.*`?text`?"):
        evaluate(config([*rows("ab"), Row({"prompt": "x"}, "text.jsonl:2")], "ppo"), {"ppo": FakePolicy(0.0, 0.0)})


def test_text_without_a_token_to_predict_is_refused() -> None:
    with pytest.raises(DataError, match="none of the 2 documents has a token that follows another"):
        evaluate(config(rows("a", "b"), "ppo"), {"ppo": FakePolicy(0.0, 0.0)})


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("\n")
    jsonl = next(spec for spec in DATA_SPECS if spec.kind == "jsonl")
    context: Any = SimpleNamespace(build_data=lambda component: jsonl.build(component.config))
    chosen = replace(config([], "ppo"), data=Component("jsonl", FileConfig(path=str(tmp_path / "text.jsonl"))))
    with pytest.raises(DataError, match=r"text\.jsonl: there are no rows in it"):
        TextLoss(chosen, context).evaluate()


CONFIG = """\
name: tax
policy: {kind: tiny_lm}
stages:
  - name: sft
    optimizer: {kind: sft}
    data: {kind: jsonl, path: text.jsonl}
  - name: reward
    start: sft
    optimizer: {kind: reward_model}
    data: {kind: jsonl, path: text.jsonl}
  - name: tax
    evaluate: {kind: text_loss, policies: [sft], data: {kind: jsonl, path: text.jsonl}}
"""


def checked(folder: Path, policies: str) -> Any:
    (folder / "text.jsonl").write_text('{"text": "ab"}\n')
    (folder / "c.yaml").write_text(CONFIG.replace("[sft]", policies))
    return load_config(folder / "c.yaml", (), find_plugins())


def test_the_policies_of_a_config_are_earlier_stages(tmp_path: Path) -> None:
    loaded = checked(tmp_path, "[sft]")
    assert loaded.run.stages[2].evaluate.config.policies == ("sft",)
    assert loaded.resolved["stages"][2]["evaluate"]["policies"] == ["sft"]


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ("[]", r"c\.yaml:12:43: tax\.evaluate\.policies is empty; name at least one earlier stage"),
        ("[sft, sft]", r'c\.yaml:12:49: tax\.evaluate\.policies\.1 is "sft", which is in the list already'),
        ("[reward]", r'c\.yaml:12:44: tax\.evaluate\.policies\.0 is "reward", which makes a reward model'),
        ("[sft, stf]", r'policies\.1 is "stf", which is not a stage \(did you mean "sft"\?\)'),
        ("sft", r'tax\.evaluate\.policies is "sft"; allowed: a list'),
    ],
)
def test_a_wrong_list_of_policies_is_an_error_with_its_place(policies: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, policies)
