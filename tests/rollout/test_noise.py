import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.rollout.noise import draw, noise_key, uniforms


def splitmix64(state: int, counter: int) -> float:
    """The published algorithm in Python's own unbounded integers."""
    full = (1 << 64) - 1
    z = (state + (counter + 1) * 0x9E3779B97F4A7C15) & full
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


@given(st.integers(0, 2**63 - 1), st.integers(0, 100_000))
def test_uniforms_are_splitmix64(key: int, position: int) -> None:
    assert uniforms(torch.tensor([key]), torch.tensor([position])).item() == splitmix64(key, position)


def test_uniforms_are_uniform() -> None:
    drawn = uniforms(torch.full((100_000,), noise_key(1, 2, "p", 3)), torch.arange(100_000))
    counts = torch.histc(drawn.float(), bins=10, min=0.0, max=1.0)
    chi2 = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_every_part_of_the_place_changes_the_key() -> None:
    places = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    assert len({noise_key(*place) for place in places}) == 5
    assert noise_key(3, 4, "x", 5) == noise_key(3, 4, "x", 5)


def test_inverse_cdf_takes_the_token_whose_share_holds_the_uniform() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().repeat(4, 1)  # cumulative: 0.2, 0.7, 1.0
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.95], dtype=torch.float64), torch.ones(4))
    assert tokens.tolist() == [0, 0, 1, 2]
    assert torch.allclose(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.3]))


def test_temperature_is_part_of_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    _, cold = draw(logits, torch.tensor([0.99], dtype=torch.float64), torch.tensor([0.5]))
    assert torch.allclose(cold, torch.log_softmax(logits / 0.5, -1)[:, 1])


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    n = 50_000
    tokens, _ = draw(logits.repeat(n, 1), uniforms(torch.full((n,), 12345), torch.arange(n)), torch.ones(n))
    expected = torch.softmax(logits[0], -1) * n
    chi2 = float(((torch.bincount(tokens, minlength=5) - expected) ** 2 / expected).sum())
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001
