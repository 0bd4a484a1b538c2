"""Known mistakes of alignment code that need a model to make; those of the tensor maths alone are in ``tests/ops/test_traps.py``.

Where it is cheap, a test first makes the mistake, to show that it would be seen.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.data.codec import TemplateCodec
from alignkit.data.collate import collate
from alignkit.interfaces import Rollout, ScoredRollout, TokenBatch, TokenScores
from alignkit.models.causal_lm import CausalPolicy, load
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.models.tiny import byte_tokenizer
from alignkit.rollout import LocalEngine
from alignkit.testing import make_context
from alignkit.types import Message, Prompt, PromptRow, Sample, Sampling, Score, TokenRow
from alignkit_ppo import CriticConfig, PPOConfig, plan
from alignkit_ppo.update import PPO
from tests.fakes import ARCHITECTURES, tiny_folder, tiny_policy

QUESTION = Prompt("q", (Message("user", "How was the film?"),))
FULL, LORA = TuningConfig(), TuningConfig(kind="lora", rank=4)
SMALL = PPOConfig(iterations=1, prompts=4, samples_per_prompt=2, max_new_tokens=8, learning_rate=1e-3)


def folder_with(architecture: str, target: Path, *, tokenizer: dict[str, Any] | None = None, model: dict[str, Any] | None = None) -> Path:
    """A tiny model's folder with some settings of its tokenizer and of its config changed."""
    changed_model = AutoModelForCausalLM.from_pretrained(tiny_folder(architecture))
    changed_tokenizer = AutoTokenizer.from_pretrained(tiny_folder(architecture))
    for name, value in (model or {}).items():
        setattr(changed_model.config, name, value)
    for name, value in (tokenizer or {}).items():
        setattr(changed_tokenizer, name, value)
    changed_model.save_pretrained(target)
    changed_tokenizer.save_pretrained(target)
    return target


def draw(policy: CausalPolicy, texts: list[str], sampling: Sampling, *, samples: int = 1) -> Rollout:
    prompts = [Prompt(str(i), (Message("user", text),), plain=True) for i, text in enumerate(texts)]
    rows = [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in prompts]
    return LocalEngine(0).rollout(policy, rows, sampling, samples_per_prompt=samples, step=0)


def make_ppo(folder: Path, config: PPOConfig = SMALL) -> tuple[PPO, ScoredRollout]:
    """PPO on a tiny model, and a rollout of it; the reward is the length of the text."""
    ppo = PPO(config, make_context(folder, plan=plan(config, 100), policy=TinyLMConfig(hidden_size=32, layers=2, heads=2, positions=128)))
    assert isinstance(ppo.policy, CausalPolicy)
    rollout = draw(ppo.policy, ["a", "bc", "def", "ghij"], Sampling(config.max_new_tokens), samples=config.samples_per_prompt)
    return ppo, ScoredRollout(rollout, tuple(Score(float(len(sample.response))) for sample in rollout.samples))


def test_s1_where_padding_and_end_of_sequence_are_one_id_the_end_is_still_trained_and_scored(tmp_path: Path) -> None:
    usual = tiny_policy()
    end = usual.codec.stop_ids[0]
    folder = folder_with("llama", tmp_path / "pad_is_eos", tokenizer={"pad_token": "<|im_end|>"}, model={"pad_token_id": end})
    policy = load(folder, tuning=FULL, precision="float32", trainable=True, seed=0)
    assert policy.codec.tokenizer.pad_token_id == policy.codec.tokenizer.eos_token_id == end

    rows = [policy.codec.sample(Sample(QUESTION, text)) for text in ("Good.", "Not good at all.")]
    assert rows == [usual.codec.sample(Sample(QUESTION, text)) for text in ("Good.", "Not good at all.")]
    ends = [max(i for i, counts in enumerate(row.loss_mask) if counts) for row in rows]
    assert [row.ids[i] for row, i in zip(rows, ends, strict=True)] == [end, end]

    batch = collate(rows)
    logprobs = policy.score_tokens(batch).logprobs.detach()
    assert all(float(logprobs[row, column]) < 0.0 for row, column in enumerate(ends))

    # The reward is the head on the last real token, the end itself (transformers' own pooling reads the token before it).
    model = load_scalar(folder, tuning=FULL, precision="float32", trainable=False, seed=1)
    padded_with_end = replace(batch, ids=torch.where(batch.mask, batch.ids, end))
    for row, tokens in enumerate(rows):
        hidden = model.backbone(torch.tensor([tokens.ids])).last_hidden_state[0]
        for scores in (model.scores(batch), model.scores(padded_with_end)):
            assert float(scores[row]) == pytest.approx(float(model.head(hidden[len(tokens) - 1])), abs=1e-5)
    assert torch.equal(policy.score_tokens(padded_with_end).logprobs, logprobs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_s2_padding_on_either_side_moves_no_position(architecture: str) -> None:
    policy = tiny_policy(architecture)
    short, long = "ab", "a prompt that is a good deal longer than the other one"
    together, alone = (draw(policy, texts, Sampling(1)) for texts in ([short, long], [short]))
    # The sampler pads on the left. The same noise drew the token, so equal log-probabilities mean the same distribution.
    at = together.batch.loss_mask[0]
    assert together.samples[0].response == alone.samples[0].response
    assert torch.allclose(together.logprobs[0][at], alone.logprobs[0][alone.batch.loss_mask[0]], atol=1e-5)
    # Training pads on the right.
    row = TokenRow("r", policy.codec.prompt(QUESTION), (False, *(True,) * (len(policy.codec.prompt(QUESTION)) - 1)))
    narrow = collate([row])
    wide = TokenBatch(*(torch.nn.functional.pad(x, (0, 9)) for x in (narrow.ids, narrow.mask, narrow.loss_mask)))
    assert torch.allclose(policy.score_tokens(wide).logprobs[:, : len(row)], policy.score_tokens(narrow).logprobs, atol=1e-5)


def test_s2_would_be_seen_where_positions_are_absolute() -> None:
    model = tiny_policy("gpt2").module
    ids = torch.tensor([[9, 8, 7]])
    padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.tensor([[0] * 4 + [1] * 3])
    with torch.no_grad():
        want, careless = model(ids).logits[0, -1], model(padded, attention_mask=mask).logits[0, -1]
        right = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[0, -1]
    assert torch.allclose(right, want, atol=1e-5)
    assert not torch.allclose(careless, want, atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_s3_rows_of_a_batch_do_not_see_each_other(architecture: str) -> None:
    """Rows are not packed into one another; nothing that stands in one of them changes a bit of the next."""
    policy = tiny_policy(architecture)
    batch = collate([policy.codec.sample(Sample(QUESTION, text)) for text in ("Good enough.", "Not good at all.")])
    changed = batch.ids.clone()
    changed[0] = torch.where(batch.mask[0], 70 + torch.arange(batch.ids.shape[1]), 5)
    before, after = policy.score_tokens(batch).logprobs, policy.score_tokens(replace(batch, ids=changed)).logprobs
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_s4_s5_responses_are_drawn_from_the_very_distribution_that_is_trained(temperature: float) -> None:
    policy = tiny_policy()
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    plain = draw(policy, ["once upon", "z"], sampling, samples=150)
    with torch.no_grad():
        trained = policy.score_tokens(plain.batch, temperature=temperature).logprobs
        untempered = policy.score_tokens(plain.batch).logprobs
    assert torch.allclose(plain.logprobs, trained, atol=1e-4)
    assert (temperature == 1.0) == torch.allclose(plain.logprobs, untempered, atol=1e-2)
    # No top-k of 50: a random model's first tokens are nearly uniform over its 260.
    first = plain.batch.loss_mask.int().argmax(dim=1)
    assert len(set(plain.batch.ids.gather(1, first[:, None]).flatten().tolist())) > 60

    # What a hub model asks for in its generation config must not leak in.
    asked: Any = policy.module.generation_config
    asked.top_k, asked.top_p, asked.temperature, asked.repetition_penalty, asked.do_sample = 3, 0.5, 0.1, 5.0, True
    again = draw(policy, ["once upon", "z"], sampling, samples=150)
    assert torch.equal(again.batch.ids, plain.batch.ids)
    assert torch.equal(again.logprobs, plain.logprobs)


@pytest.mark.parametrize("microbatch_tokens", [1, 40, 100_000])
def test_s8_the_optimizer_steps_once_a_minibatch_however_many_microbatches(tmp_path: Path, microbatch_tokens: int) -> None:
    config = replace(
        SMALL, epochs=2, minibatches=3, microbatch_tokens=microbatch_tokens, critic=CriticConfig(microbatch_tokens=microbatch_tokens)
    )
    ppo, rollout = make_ppo(tmp_path, config)
    ppo.update(rollout)
    # Counted by torch.optim.AdamW itself, for each weight.
    counts = {name: float(tensor) for name, tensor in ppo.state().tensors.items() if "adam.step/" in name}
    assert any(name.startswith("policy/") for name in counts)
    assert any(name.startswith("critic/") for name in counts)
    assert set(counts.values()) == {2 * 3}


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_s9_no_dropout_anywhere_also_after_an_update(architecture: str, tuning: TuningConfig, tmp_path: Path) -> None:
    # One of these names is the one that each architecture knows.
    asked = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"), 0.5)
    folder = folder_with(architecture, tmp_path / "wants_dropout", model=asked)
    batch = collate([TokenRow("r", tuple(range(10, 40)), (False,) + (True,) * 29)])

    careless = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(careless(batch.ids).logits, careless(batch.ids).logits)

    policy = load(folder, tuning=tuning, precision="float32", trainable=True, seed=0)
    reference, scalar = policy.reference(), load_scalar(folder, tuning=tuning, precision="float32", trainable=True, seed=0)
    learner = torch.optim.SGD([weight for weight in policy.module.parameters() if weight.requires_grad], lr=0.01)
    for _ in range(2):
        figures: list[Tensor] = [policy.score_tokens(batch).logprobs, reference.score_tokens(batch).logprobs, scalar.values(batch)]
        again: list[Tensor] = [policy.score_tokens(batch).logprobs, reference.score_tokens(batch).logprobs, scalar.values(batch)]
        assert all(torch.equal(first, second) for first, second in zip(figures, again, strict=True))
        figures[0].sum().backward()
        learner.step()


def test_s10_the_tokens_that_are_trained_are_the_tokens_that_were_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ppo, scored = make_ppo(tmp_path)
    batch = scored.rollout.batch
    drawn = [tuple(ids[mask].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    # The text does not bring them back: random bytes are not UTF-8, and special tokens are not text.
    again = [ppo.policy.codec.sample(sample).ids for sample in scored.rollout.samples]
    assert all(there != back for there, back in zip(drawn, again, strict=True))

    seen: Counter[tuple[int, ...]] = Counter()
    plainly = CausalPolicy.score_tokens

    def watched(self: CausalPolicy, part: TokenBatch, **options: Any) -> TokenScores:
        if self is ppo.policy:
            seen.update(tuple(ids[mask].tolist()) for ids, mask in zip(part.ids, part.mask, strict=True))
        return plainly(self, part, **options)

    monkeypatch.setattr(CausalPolicy, "score_tokens", watched)
    ppo.update(scored)
    assert seen == Counter(drawn)


def test_s11_a_chat_has_one_beginning_of_sequence() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|end|>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", begin)])
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    codec = TemplateCodec(tokenizer, (tokenizer.eos_token_id,))

    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer(chat).input_ids.count(begin) == 2  # the mistake

    plain = Prompt("p", (Message("user", "The film"),), plain=True)
    for prompt in (QUESTION, plain):
        ids, row = codec.prompt(prompt), codec.sample(Sample(prompt, " was good."))
        assert ids[0] == row.ids[0] == begin
        assert ids.count(begin) == row.ids.count(begin) == 1
        assert row.ids[: len(ids)] == ids
        assert not any(row.loss_mask[: len(ids)])
