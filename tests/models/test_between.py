"""What decoding does between its products, compiled or not, is the same."""

import logging
from dataclasses import replace

import pytest
import torch

from alignkit.models import kernels
from alignkit.models.between import between_products
from alignkit.models.kernels import Kernels
from alignkit.rollout.decoder import Decoder, Request
from tests.fakes import tiny_policy


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_chosen", Kernels())


def drawn() -> list[tuple[int, int, float]]:
    with tiny_policy("llama").decoding() as model:
        decoder = Decoder(model, max_rows=3)
        for i in range(5):
            decoder.add(Request(tuple(range(8, 12 + i)), 4 + i, 1.0, (), noise_key=i))
        events = []
        while decoder.busy:
            events += decoder.step()
    return [(event.request, event.token, event.logprob) for event in events]


def test_compiled_it_draws_the_same_tokens() -> None:
    if not kernels.compiles(torch.device("cpu")):
        pytest.skip("torch.compile needs a C++ compiler")
    plain = drawn()
    kernels.use(replace(kernels.chosen(), fused=True))
    fused = drawn()
    assert [event[:2] for event in fused] == [event[:2] for event in plain]
    assert [event[2] for event in fused] == pytest.approx([event[2] for event in plain], abs=1e-4)


def test_it_is_compiled_where_that_was_chosen_and_only_there() -> None:
    assert between_products() is between_products()
    plain = between_products()
    kernels.use(Kernels(fused=True))
    assert not set(between_products()) & set(plain)


def test_where_nothing_can_be_compiled_that_is_said_and_it_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(work: object) -> object:
        raise RuntimeError("Failed to find C compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fails)
    with caplog.at_level(logging.WARNING):
        assert not kernels.compiles(torch.device("cpu"))
    assert caplog.messages == ["torch.compile does not work here, so decoding goes on without it: Failed to find C compiler"]
