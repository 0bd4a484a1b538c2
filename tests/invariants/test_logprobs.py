from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignkit.data.collate import collate
from alignkit.interfaces import Rollout, TokenBatch
from alignkit.models.causal_lm import CausalPolicy
from alignkit.models.config import Precision, TuningConfig
from alignkit.models.scalar import load_scalar
from alignkit.rollout import LocalEngine
from alignkit.types import Message, Prompt, PromptRow, Sampling, TokenRow
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import Architecture, vivid_folder, vivid_policy

TEXTS = ["a", "the film was", "What do you think?", "a prompt that is a good deal longer than all of the others", "xyz"]


def rows() -> list[TokenRow]:
    """Prompts and responses of every proportion; the last row is scored from its second token on."""
    lengths = [(3, 5), (7, 2), (1, 19), (2, 1), (12, 9), (1, 4)]
    return [
        TokenRow(str(i), tuple(4 + (71 * i + 37 * j + j * j) % 250 for j in range(p + r)), (False,) * p + (True,) * r)
        for i, (p, r) in enumerate(lengths)
    ]


def plainly(policy: CausalPolicy, row: TokenRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the row's tokens [t] but for the first, from all logits at once, in float64."""
    with torch.no_grad():
        logits = policy.module(torch.tensor([row.ids])).logits[0, :-1].double() / temperature
    logs = torch.log_softmax(logits, dim=-1)
    return logs.gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def draw(policy: CausalPolicy, texts: list[str], sampling: Sampling) -> Rollout:
    prompts = [Prompt(text, (Message("user", text),), plain=True) for text in texts]
    asked = [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in prompts]
    return LocalEngine(0).rollout(policy, asked, sampling, samples_per_prompt=2, step=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_i_lp_1_scores_are_the_log_softmax_of_float64(architecture: Architecture, temperature: float) -> None:
    """Log-probabilities and entropies equal those from all logits in float64, to 1e-5."""
    policy = vivid_policy(architecture)
    with torch.no_grad():
        scores = policy.score_tokens(collate(rows()), temperature=temperature)
    for i, row in enumerate(rows()):
        counts = torch.tensor(row.loss_mask)
        for ours, plain in zip((scores.logprobs, scores.entropy), plainly(policy, row, temperature), strict=True):
            assert torch.allclose(ours[i, : len(row)][counts].double(), plain[counts[1:]], rtol=0.0, atol=1e-5)
            assert not ours[i, : len(row)][~counts].any()
            assert not ours[i, len(row) :].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_i_lp_1_in_bfloat16_scores_are_near(architecture: Architecture, temperature: float) -> None:
    """In bfloat16 they are off by 2e-2 on average, and by 5e-2 at most."""
    exact, half = vivid_policy(architecture), vivid_policy(architecture, precision="bfloat16")
    with torch.no_grad():
        scores = half.score_tokens(collate(rows()), temperature=temperature).logprobs
    assert scores.dtype == torch.float32
    off = torch.cat(
        [
            (scores[i, 1 : len(row)].double() - plainly(exact, row, temperature)[0]).abs()[torch.tensor(row.loss_mask[1:])]
            for i, row in enumerate(rows())
        ]
    )
    assert 0.0 < float(off.mean()) < 2e-2
    assert float(off.max()) < 5e-2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_lp_2_neither_right_padding_nor_company_nor_order_changes_a_figure(architecture: Architecture) -> None:
    """A sequence's log-probabilities, values and score are the same alone, in any batch and order, with any padding, to 1e-5."""
    policy = vivid_policy(architecture)
    model = load_scalar(vivid_folder(architecture), tuning=TuningConfig(), precision="float32", trainable=False, seed=1)

    @torch.no_grad()
    def figures(some: list[TokenRow], padding: int) -> list[Tensor]:
        """Of each row: its log-probabilities, its values and its score in one tensor."""
        narrow = collate(some)
        batch = TokenBatch(*(torch.nn.functional.pad(x, (0, padding)) for x in (narrow.ids, narrow.mask, narrow.loss_mask)))
        # Whatever token pads.
        batch.ids[~batch.mask] = 200
        logprobs, values, scores = policy.score_tokens(batch).logprobs, model.values(batch), model.scores(batch)
        return [torch.cat([logprobs[i, : len(row)], values[i, : len(row)], scores[i : i + 1]]) for i, row in enumerate(some)]

    alone = [figures([row], 0)[0] for row in rows()]
    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0], [3, 4, 1]]
    for order in orders:
        for padding in (0, 1, 7):
            for i, ours in zip(order, figures([rows()[i] for i in order], padding), strict=True):
                assert torch.allclose(ours, alone[i], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_i_lp_2_left_padding_changes_no_figure_of_the_sampler(architecture: Architecture) -> None:
    """A response has the same tokens and log-probabilities alone and beside longer prompts, left-padded to them, to 1e-5."""
    policy, sampling = vivid_policy(architecture), Sampling(max_new_tokens=8)
    together = draw(policy, TEXTS, sampling)
    for i, text in enumerate(TEXTS):
        alone = draw(policy, [text], sampling)
        for sample in range(2):
            crowd, single = 2 * i + sample, alone.batch.loss_mask[sample]
            among = together.batch.loss_mask[crowd]
            assert torch.equal(together.batch.ids[crowd][among], alone.batch.ids[sample][single])
            assert torch.allclose(together.logprobs[crowd][among], alone.logprobs[sample][single], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_i_lp_3_the_sampler_and_the_training_forward_agree(architecture: Architecture, temperature: float, precision: Precision) -> None:
    """Recorded log-probabilities are the training forward's: to 1e-4 in float32, to 2e-2 on average in bfloat16."""
    policy = vivid_policy(architecture, precision=precision)
    rollout = draw(policy, TEXTS, Sampling(max_new_tokens=12, temperature=temperature))
    with torch.no_grad():
        trained = policy.score_tokens(rollout.batch, temperature=temperature).logprobs
        untempered = policy.score_tokens(rollout.batch).logprobs
    mask = rollout.batch.loss_mask
    off = (rollout.logprobs - trained).abs()[mask]
    assert rollout.exact == (precision == "float32")
    assert float(off.max() if rollout.exact else off.mean()) < (1e-4 if rollout.exact else 2e-2)
    assert not rollout.logprobs[~mask].any()
    # The mistake would be seen.
    assert temperature == 1.0 or float((rollout.logprobs - untempered).abs()[mask].mean()) > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 50.0])
def test_i_lp_4_probabilities_add_up_to_one_and_entropy_stays_in_its_bounds(architecture: Architecture, temperature: float) -> None:
    """Over the whole vocabulary exp(lp) adds up to 1, and the entropy lies between 0 and log V, to 1e-6."""
    policy = vivid_policy(architecture)
    size = policy.module.get_input_embeddings().weight.shape[0]
    beginning = (9, 80, 33, 120)
    every = collate([TokenRow(str(token), (*beginning, token), (False,) * len(beginning) + (True,)) for token in range(size)])
    with torch.no_grad():
        scores = policy.score_tokens(every, temperature=temperature)
    logprobs, entropy = scores.logprobs[:, -1].double(), scores.entropy[:, -1].double()
    assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(entropy.min()) >= -1e-6
    assert float(entropy.max()) <= math.log(size) + 1e-6
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(), rtol=0.0, atol=1e-5)
