from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from alignkit.data.codec import TemplateCodec
from alignkit.data.collate import collate, pack
from alignkit.interfaces import TokenBatch
from alignkit.models.attention import lay_out
from alignkit.models.causal_lm import CausalPolicy, load, make_codec
from alignkit.models.config import TinyLMConfig, TuningConfig
from alignkit.ops.logprobs import token_logprobs
from alignkit.ops.losses import nll_loss
from alignkit.rollout import LocalEngine
from alignkit.testing import make_context
from alignkit.types import Demonstration, Message, Prompt, PromptRow, Sampling, TokenRow
from alignkit_sft import SFTConfig, plan
from alignkit_sft.update import SFT
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import (
    Architecture,
    first_gradient,
    gradient_of,
    relative_distance,
    vivid_context,
    vivid_policy,
)

UNCLIPPED = SFTConfig(batch=8, clip_norm=1e9)


def document(number: int, length: int, prompt: int) -> TokenRow:
    """``length`` tokens, trained after the first ``prompt`` of them."""
    ids = tuple(4 + (61 * number + 29 * j + j * j) % 250 for j in range(length))
    return TokenRow(str(number), ids, tuple(j >= prompt for j in range(length)))


def asked(*turns: str) -> Demonstration:
    """A conversation of user and assistant by turns; what the assistant says after the first question is to be learnt."""
    question, *rest = (Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    return Demonstration(Prompt("p", (question,)), tuple(rest))


CONVERSATIONS = [
    (asked("Hi", "Hello!"), [b"Hello!"]),
    (asked("How was the film, and who made it?", "", "Well?", "Fine — 好."), [b"", "Fine — 好.".encode()]),
    (asked("1", "one", "2", "two", "3", "three"), [b"one", b"two", b"three"]),
]
"""Demonstrations, with what is trained of each; the tokenizer has a token for each byte."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_1_a_gradient_does_not_depend_on_the_number_of_microbatches(architecture: Architecture, tmp_path: Path) -> None:
    """One batch in 1, 2, 4 and 8 microbatches with 1 to 19 trained tokens a row: the same gradient, to 1e-5 of its length."""
    # Nearly as long as each other, so that a limit of one row's length is a microbatch for each; trained from anywhere.
    batch = [document(i, length=20 - i % 4, prompt=prompt) for i, prompt in enumerate((1, 16, 4, 9, 19, 2, 14, 7))]

    def step(microbatches: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        config = replace(UNCLIPPED, microbatch_tokens=20 * 8 // microbatches)
        sft = SFT(config, vivid_context(tmp_path, architecture, plan(config, 8)))
        forwards: list[None] = []
        sft._policy.module.base_model.register_forward_hook(lambda *_: forwards.append(None))
        metrics = dict(sft.update(batch))
        assert len(forwards) == microbatches
        return metrics, first_gradient(sft.state())

    whole, gradient = step(1)
    for microbatches in (2, 4, 8):
        metrics, ours = step(microbatches)
        assert relative_distance(ours, gradient) < 1e-5
        assert metrics["loss/nll_nats"] == pytest.approx(whole["loss/nll_nats"], rel=1e-5)
        assert metrics["data/trained_tokens"] == whole["data/trained_tokens"] == 19 + 3 + 14 + 8 + 1 + 17 + 4 + 10


def summed(policy: CausalPolicy, batch: TokenBatch) -> Tensor:
    return nll_loss(policy.score_tokens(batch).logprobs, batch.loss_mask, tokens_in_step=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_2_packed_documents_score_and_teach_as_they_do_alone(architecture: Architecture) -> None:
    """Each token's log-probability in a packed row, and the summed loss and its gradient, equal the unpacked ones, to 1e-5."""
    policy = vivid_policy(architecture)
    documents = [document(0, 9, 3), document(1, 14, 1), document(2, 2, 1), document(3, 21, 15), document(4, 5, 0)]
    bins = [[0, 1, 2], [3], [4, 2, 0]]
    packed = pack([[documents[i] for i in some] for some in bins])
    assert packed.positions is not None
    logprobs = policy.score_tokens(packed).logprobs
    careless = policy.score_tokens(replace(packed, positions=None)).logprobs
    for row, some in enumerate(bins):
        start = 0
        for i in some:
            (alone,) = policy.score_tokens(collate([documents[i]])).logprobs
            here = slice(start, start + len(documents[i]))
            assert torch.allclose(logprobs[row, here], alone, rtol=0.0, atol=1e-5)
            # Without positions all but the first document of a row would see what stands before it.
            assert torch.allclose(careless[row, here], alone, rtol=0.0, atol=1e-2) == (start == 0)
            start += len(documents[i])
    unpacked = collate([documents[i] for some in bins for i in some])
    ours, plain = summed(policy, packed), summed(policy, unpacked)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert relative_distance(gradient_of(ours, policy.module), gradient_of(plain, policy.module)) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_2_no_document_changes_a_bit_of_its_neighbours(architecture: Architecture) -> None:
    """Other tokens in one document of a packed row change the log-probabilities of the others by exactly 0, in float64."""
    policy = vivid_policy(architecture)
    policy.module.double()
    documents = [document(0, 9, 3), document(1, 14, 1), document(2, 6, 2)]
    packed = pack([documents])
    edges = (0, 9, 23, 29)
    before = policy.score_tokens(packed).logprobs[0]
    assert before.dtype == torch.float64
    for changed in range(3):
        ids = packed.ids.clone()
        ids[0, edges[changed] : edges[changed + 1]] = torch.arange(40, 40 + len(documents[changed]))
        after = policy.score_tokens(replace(packed, ids=ids)).logprobs[0]
        for other in range(3):
            here = slice(edges[other], edges[other + 1])
            assert torch.equal(after[here], before[here]) == (other != changed)


def codec_that_pads_with_the_end(architecture: Architecture, folder: Path) -> TemplateCodec:
    """The architecture's codec, its padding token being its end-of-turn token."""
    policy = vivid_policy(architecture)
    policy.module.config.pad_token_id = policy.codec.stop_ids[0]
    policy.save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    codec = make_codec(AutoTokenizer.from_pretrained(folder), policy.module.config)
    assert codec.tokenizer.pad_token_id == codec.tokenizer.eos_token_id == codec.stop_ids[0]
    return codec


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_3_the_assistants_tokens_and_the_ends_of_its_turns_are_trained(architecture: Architecture, tmp_path: Path) -> None:
    """Trained are the assistant's tokens and its end-of-turn tokens and nothing else, also where the end of a turn is what pads."""
    usual, padding = vivid_policy(architecture).codec, codec_that_pads_with_the_end(architecture, tmp_path)
    (end,) = usual.stop_ids
    for demonstration, spoken in CONVERSATIONS:
        row = usual.demonstration(demonstration)
        assert padding.demonstration(demonstration) == row
        assert sum(row.loss_mask) == sum(len(text) + 1 for text in spoken)
        trained = [token for token, counts in zip(row.ids, row.loss_mask, strict=True) if counts]
        assert trained == [token for text in spoken for token in (*usual.tokenizer(text.decode()).input_ids, end)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_3_where_the_end_of_a_turn_is_what_pads_it_is_learnt_all_the_same(architecture: Architecture, tmp_path: Path) -> None:
    """Rows padded with the end-of-turn token have the same loss, the same count of trained tokens, and a gradient at every true end."""
    codec_that_pads_with_the_end(architecture, tmp_path)
    policy = load(tmp_path, tuning=TuningConfig(), precision="float32", trainable=True, seed=0)
    (end,) = policy.codec.stop_ids
    batch = collate([policy.codec.demonstration(demonstration) for demonstration, _ in CONVERSATIONS])
    padded = replace(batch, ids=torch.where(batch.mask, batch.ids, end))
    assert not torch.equal(padded.ids, batch.ids)

    logprobs, usual = policy.score_tokens(padded).logprobs, policy.score_tokens(batch).logprobs
    assert torch.equal(logprobs, usual)
    logprobs.retain_grad()
    nll_loss(logprobs, padded.loss_mask, tokens_in_step=1).backward()
    assert logprobs.grad is not None
    ends = padded.loss_mask & (padded.ids == end)
    assert int(ends.sum()) == 1 + 2 + 3
    assert bool((logprobs.detach()[ends] < 0.0).all())
    assert bool((logprobs.grad[ends] == -1.0).all())
    assert not logprobs.grad[~padded.loss_mask].any()

    config = replace(UNCLIPPED, batch=3)
    sft = SFT(config, replace(vivid_context(tmp_path, architecture, plan(config, 3)), load_policy=lambda stage, trainable: policy))
    rows = [policy.codec.demonstration(demonstration) for demonstration, _ in CONVERSATIONS]
    assert sft.update(rows)["data/trained_tokens"] == sum(len(text) + 1 for _, spoken in CONVERSATIONS for text in spoken)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_4_what_the_user_says_decides_nothing_about_what_is_trained(architecture: Architecture) -> None:
    """Another user text of the same length leaves the mask and the labels as they are."""
    codec = vivid_policy(architecture).codec
    row = codec.demonstration(asked("How are you?", "Fine.", "Sure?", "Yes."))
    # Other words; the assistant's very words in the user's mouth; line breaks, as the template has them.
    for first, second in (("Who are you?", "What?"), ("Fine.Yes.Yes", "Fine."), ("\nassistant\n\n", "Yes.\n")):
        other = codec.demonstration(asked(first, "Fine.", second, "Yes."))
        assert other.ids != row.ids
        assert other.loss_mask == row.loss_mask
        labels, others = ([token for token, counts in zip(r.ids, r.loss_mask, strict=True) if counts] for r in (row, other))
        assert others == labels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_4_nothing_is_learnt_where_nothing_is_marked(architecture: Architecture) -> None:
    """The gradient of the logits that predict unmarked tokens, and of the hidden states behind them, is exactly 0."""
    policy = vivid_policy(architecture)
    batch = collate([policy.codec.demonstration(demonstration) for demonstration, _ in CONVERSATIONS])
    predicting = torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))

    logits = policy.module(batch.ids).logits
    loss = nll_loss(token_logprobs(logits[:, :-1], batch.ids[:, 1:]), batch.loss_mask[:, 1:], tokens_in_step=int(batch.loss_mask.sum()))
    (slope,) = torch.autograd.grad(loss, logits)
    assert torch.equal((slope != 0.0).any(dim=-1), predicting)

    # As the stage computes it, which makes no logits but those that it needs.
    seen: list[Tensor] = []
    policy.module.base_model.register_forward_hook(lambda model, inputs, output: seen.append(output.last_hidden_state))
    loss = nll_loss(policy.score_tokens(batch).logprobs, batch.loss_mask, tokens_in_step=int(batch.loss_mask.sum()))
    (slope,) = torch.autograd.grad(loss, seen)
    layout = lay_out(batch)
    in_line = torch.zeros(len(layout.tokens), dtype=torch.bool).index_fill(0, layout.line[predicting], True)
    assert torch.equal((slope[0] != 0.0).any(dim=-1), in_line)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_sft_5_four_examples_are_learnt_by_heart_and_the_answers_stop(architecture: Architecture, tmp_path: Path) -> None:
    """In 200 steps the loss falls below 0.05, and greedy decoding says each answer word for word and stops."""
    pairs = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}
    config = SFTConfig(batch=4, learning_rate=5e-3)
    tiny = TinyLMConfig(architecture=architecture, hidden_size=32, layers=2, heads=4, positions=64)
    sft = SFT(config, make_context(tmp_path, plan=plan(config, 200 * 4), policy=tiny))
    codec = sft._policy.codec
    batch = [codec.demonstration(asked(word, answer)) for word, answer in pairs.items()]
    for _ in range(200):
        metrics = sft.update(batch)
    assert metrics["loss/nll_nats"] < 0.05
    assert metrics["optimizer/learning_rate"] < 0.11 * config.learning_rate  # the 200 steps were the whole plan
    prompts = [Prompt(word, (Message("user", word),)) for word in pairs]
    rows = [PromptRow(prompt, codec.prompt(prompt)) for prompt in prompts]
    # So cold that the likeliest token is drawn.
    rollout = LocalEngine(0).rollout(sft._policy, rows, Sampling(12, temperature=1e-4), samples_per_prompt=1, step=0)
    assert [sample.response for sample in rollout.samples] == list(pairs.values())
    assert all(sample.finished for sample in rollout.samples)
