import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignkit.ops import logprobs as module
from alignkit.ops.logprobs import entropy, selective_logprobs, token_logprobs

ROWS, WIDTH, WORDS = 7, 5, 11


def made_up(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head weight and bias, tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens = torch.randint(0, WORDS, (ROWS,), generator=generator)
    return normal(ROWS, WIDTH), normal(WORDS, WIDTH), normal(WORDS), tokens


def plainly(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What is meant, in float64, with all logits at once."""
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logs = torch.log_softmax(logits / temperature, dim=-1)
    return logs[torch.arange(len(tokens)), tokens], -(logs.exp() * logs).sum(dim=-1)


@pytest.fixture(params=[WORDS, 3 * WORDS, 1 << 24], ids=["one row a chunk", "three rows a chunk", "one chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", request.param)
    monkeypatch.setitem(module._KEPT, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selective_is_the_plain_computation(dtype: torch.dtype, frozen_head: bool, with_bias: bool, temperature: float) -> None:
    """I-LP-1, and the gradients."""
    hidden, weight, bias, tokens = made_up(dtype)
    weight.requires_grad_(not frozen_head)
    bias.requires_grad_(not frozen_head)
    used = bias if with_bias else None
    scores, entropies = selective_logprobs(hidden, weight, tokens, bias=used, temperature=temperature)
    want, want_entropies = plainly(hidden, weight, used, tokens, temperature)
    exact = 1e-12 if dtype == torch.float64 else 1e-6
    assert scores.dtype == entropies.dtype == dtype
    assert torch.allclose(scores.double(), want, rtol=exact, atol=exact)
    assert torch.allclose(entropies.double(), want_entropies, rtol=exact, atol=exact)
    assert not entropies.requires_grad

    wanting = [x for x in (hidden, weight, used) if x is not None and x.requires_grad]
    pull = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
    got = torch.autograd.grad((scores * pull).sum(), wanting)
    for ours, plain in zip(got, torch.autograd.grad((want * pull).sum(), wanting), strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(ours, plain, rtol=1e-5, atol=exact)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("frozen_head", [False, True])
def test_selective_gradients_by_finite_differences(frozen_head: bool) -> None:
    hidden, weight, bias, tokens = made_up(torch.float64)
    weight.requires_grad_(not frozen_head)
    bias.requires_grad_(not frozen_head)
    assert torch.autograd.gradcheck(
        lambda h, w, b: selective_logprobs(h, w, tokens, bias=b, temperature=0.7)[0], (hidden, weight, bias), atol=1e-7
    )


def test_a_weight_alone_may_want_the_gradient() -> None:
    hidden, weight, _, tokens = made_up(torch.float64)
    scores, _ = selective_logprobs(hidden.detach(), weight, tokens)
    want, _ = plainly(hidden.detach(), weight, None, tokens, 1.0)
    assert torch.allclose(torch.autograd.grad(scores.sum(), weight)[0], torch.autograd.grad(want.sum(), weight)[0])


@pytest.mark.parametrize("frozen_head", [False, True])
def test_no_more_than_a_chunk_of_logits_exists_at_once(monkeypatch: pytest.MonkeyPatch, frozen_head: bool) -> None:
    hidden, weight, _, tokens = made_up(torch.float32)
    weight.requires_grad_(not frozen_head)
    monkeypatch.setitem(module._CHUNK, "cpu", 3 * WORDS)
    monkeypatch.setitem(module._KEPT, "cpu", 3 * WORDS)
    made: list[int] = []
    plainly_made = module._logits

    def watched(*inputs: Any) -> Tensor:
        logits = plainly_made(*inputs)
        made.append(len(logits))
        return logits

    monkeypatch.setattr(module, "_logits", watched)
    kept: list[torch.Size] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scores, _ = selective_logprobs(hidden, weight, tokens)
    torch.autograd.grad(scores.sum(), hidden)
    # Seven rows: 3 + 3 + 1, and once more for the backward pass of a trained head; a frozen one needs no second time.
    assert made == [3, 3, 1] * (1 if frozen_head else 2)
    assert (ROWS, WORDS) not in kept


def test_no_tokens_no_scores() -> None:
    hidden, weight, _, tokens = made_up(torch.float32)
    scores, entropies = selective_logprobs(hidden[:0], weight, tokens[:0])
    assert scores.shape == entropies.shape == (0,)
    assert not torch.autograd.grad(scores.sum(), weight)[0].any()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("frozen_head", [False, True])
def test_autocast_is_the_same_forward_and_backward(frozen_head: bool) -> None:
    hidden, weight, _, tokens = made_up(torch.float32)
    weight.requires_grad_(not frozen_head)
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = selective_logprobs(hidden, weight, tokens)
    want, _ = plainly(hidden, weight, None, tokens, 1.0)
    assert scores.dtype == torch.float32
    error = (scores - want).abs()
    assert 0 < error.max() < 5e-2
    assert error.mean() < 2e-2
    trained = (hidden,) if frozen_head else (hidden, weight)
    for ours, plain in zip(torch.autograd.grad(scores.sum(), trained), torch.autograd.grad(want.sum(), trained), strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, plain, atol=5e-2)


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.3, 0.7, 1.0, 2.0]))
def test_the_chances_of_a_whole_vocabulary_add_up_to_one(seed: int, temperature: float) -> None:
    """I-LP-4."""
    logits = 5.0 * torch.randn(WORDS, generator=torch.Generator().manual_seed(seed))
    each = token_logprobs(logits.expand(WORDS, WORDS), torch.arange(WORDS), temperature=temperature)
    assert abs(float(each.exp().sum()) - 1.0) < 1e-6
    assert -1e-6 <= float(entropy(logits, temperature=temperature)) <= math.log(WORDS) + 1e-6
    # A head that copies gives the same, token by token.
    scores, entropies = selective_logprobs(logits.expand(WORDS, WORDS), torch.eye(WORDS), torch.arange(WORDS), temperature=temperature)
    assert torch.allclose(scores, each, atol=1e-5)
    assert torch.allclose(entropies, entropy(logits, temperature=temperature).expand(WORDS), atol=1e-5)


def test_entropy_at_its_bounds() -> None:
    assert abs(float(entropy(torch.zeros(8))) - math.log(8)) < 1e-6
    assert float(entropy(torch.tensor([100.0, 0.0, 0.0]))) < 1e-6


def test_entropy_can_be_a_bonus() -> None:
    logits = torch.randn(3, WORDS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: entropy(x, temperature=0.7), logits)


def test_large_logits_keep_the_digits_of_a_likely_token() -> None:
    # log(1 / (1 + e^-12)) = -6.1442e-6: log-sum-exp minus a logit of 1000 would be off by 6e-5.
    logits = torch.tensor([[1000.0, 988.0]])
    want = -math.log1p(math.exp(-12.0))
    assert float(token_logprobs(logits, torch.tensor([0]))) == pytest.approx(want, rel=1e-2)
    scores, _ = selective_logprobs(logits, torch.eye(2), torch.tensor([0]))
    assert float(scores) == pytest.approx(want, rel=1e-2)
    # And an unlikely token costs what it should: e^1000 is not a number in float32.
    far = torch.tensor([[1000.0, 0.0]])
    assert float(selective_logprobs(far, torch.eye(2), torch.tensor([1]))[0]) == -1000.0


@pytest.mark.parametrize("trained_head", [True, False])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_entropies_have_the_gradient_of_plain_autograd_when_it_is_asked_for(trained_head: bool, temperature: float) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=torch.float64, requires_grad=trained_head)
    bias = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=trained_head)
    tokens, factors = torch.tensor([0, 3, 10, 5, 5, 1]), torch.randn(2, 6, generator=generator, dtype=torch.float64)
    inputs = (hidden, weight, bias) if trained_head else (hidden,)

    ours = selective_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, entropy_gradient=True)
    gradients = torch.autograd.grad((ours[0] * factors[0]).sum() + (ours[1] * factors[1]).sum(), inputs)
    logits = hidden @ weight.T + bias
    plain = token_logprobs(logits, tokens, temperature=temperature), entropy(logits, temperature=temperature)
    wanted = torch.autograd.grad((plain[0] * factors[0]).sum() + (plain[1] * factors[1]).sum(), inputs)
    assert torch.allclose(ours[1], plain[1], atol=1e-10)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, want, atol=1e-10)


def test_entropies_have_no_gradient_unless_it_is_asked_for() -> None:
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4)
    assert not selective_logprobs(hidden, weight, torch.tensor([1, 2]))[1].requires_grad
