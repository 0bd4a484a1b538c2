"""The ways of multiplying are one way, and what is chosen is a choice."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alignkit.data.collate import collate
from alignkit.models import kernels
from alignkit.models.kernels import Decode, Kernels, OneDNNLinear, install, probe, product, use
from alignkit.rollout import LocalEngine
from alignkit.types import Message, Prompt, PromptRow, Sampling, TokenRow
from tests.fakes import ARCHITECTURES, tiny_policy

Seconds = Mapping[str, float]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = kernels.chosen()
    yield
    use(before)


def test_a_probe_says_what_run_json_can_keep() -> None:
    found = probe()
    assert Kernels(**dataclasses.asdict(found)) == found


TRAINING, DECODING = {"torch": 1.0}, {"torch": 1.0, "transposed": 1.0}


@pytest.mark.parametrize(
    ("training", "decoding", "fastest"),
    [
        ({}, {"transposed": 0.9}, Kernels()),  # within a measurement's noise
        ({}, {"transposed": 0.8}, Kernels(decode="transposed")),
        ({"onednn": 0.8}, {"packed": 1.0}, Kernels(linear="onednn", decode="packed")),
        ({"onednn": 1.0}, {"packed": 0.8}, Kernels(linear="onednn", decode="packed")),
        ({"onednn": 0.9}, {"packed": 0.9}, Kernels()),
        ({"onednn": 1.2}, {"packed": 0.5}, Kernels()),  # training would be slower, and other products are not for the sampler alone
        ({"onednn": 0.5}, {"packed": 1.2}, Kernels()),
        ({"onednn": 1.0}, {"transposed": 0.7, "packed": 0.6}, Kernels(decode="transposed")),  # packed is not much faster than that
        ({"bfloat16": 0.6}, {}, Kernels(bfloat16=True)),
        ({"bfloat16": 0.6, "onednn": 0.8}, {"packed": 0.9}, Kernels(linear="onednn", decode="packed")),  # than which bfloat16 gains little
        ({"bfloat16": 1.5}, {"bfloat16": 1.5, "packed bfloat16": 1.4}, Kernels()),
        ({"bfloat16": 0.5}, {"bfloat16": 0.5, "packed bfloat16": 0.4}, Kernels(bfloat16=True, decode_bfloat16="packed")),
    ],
)
def test_another_way_is_taken_where_it_is_noticeably_faster(training: Seconds, decoding: Seconds, fastest: Kernels) -> None:
    assert kernels._fastest(TRAINING | training, DECODING | decoding) == fastest


def test_a_run_that_goes_on_multiplies_as_it_began_where_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed, compiled, half = Kernels(), Kernels(decode="packed"), Kernels(fused=True), Kernels(decode_bfloat16="packed")
    monkeypatch.setattr(kernels, "probe", lambda: plain)
    assert kernels.again(dataclasses.asdict(packed)) == packed
    with monkeypatch.context() as other:
        other.setattr(kernels, "_has_bfloat16", lambda: True)
        assert kernels.again(dataclasses.asdict(half)) == half
        other.setattr(kernels, "_has_bfloat16", lambda: False)
        assert kernels.again(dataclasses.asdict(dataclasses.replace(half, bfloat16=True))) == Kernels(bfloat16=True)
    assert kernels.again({"way_of_a_later_version": True}) == plain
    monkeypatch.setattr(kernels, "compiles", lambda device: False)
    assert kernels.again(dataclasses.asdict(compiled)) == plain
    monkeypatch.setattr(kernels, "_has_onednn", lambda x, weight: False)
    assert kernels.again(dataclasses.asdict(packed)) == plain
    monkeypatch.setattr(kernels, "_has_bfloat16", lambda: True)
    assert kernels.again(dataclasses.asdict(half)) == plain
    assert kernels.again(dataclasses.asdict(Kernels(decode="transposed"))) == Kernels(decode="transposed")


def test_a_process_computes_with_what_it_was_told() -> None:
    use(Kernels(linear="onednn"))
    assert kernels.chosen().linear == "onednn"


@pytest.mark.parametrize("decode", ["torch", "transposed", "packed"])
@pytest.mark.parametrize("bias", [True, False])
@given(rows=st.integers(1, 80), width=st.integers(1, 70), out=st.integers(1, 70))
def test_a_prepared_product_is_the_linear_layer(decode: Decode, bias: bool, rows: int, width: int, out: int) -> None:
    use(Kernels(decode=decode))
    layer, x = nn.Linear(width, out, bias=bias), torch.randn(rows, width)
    with torch.inference_mode():
        assert torch.allclose(product(layer.weight, layer.bias, torch.float32)(x), layer(x), atol=1e-5)
        assert torch.allclose(product(layer.weight.t().contiguous().t(), layer.bias, torch.float32)(x), layer(x), atol=1e-5)
        assert product(layer.weight, layer.bias, torch.bfloat16)(x).dtype == torch.bfloat16
        batch = x[None].repeat(2, 1, 1)  # as transformers passes it, where a row is no row of the batch
        assert torch.allclose(product(layer.weight, layer.bias, torch.float32)(batch), layer(batch), atol=1e-5)


@pytest.mark.skipif(not kernels._has_bfloat16(), reason="this processor has no instructions for bfloat16")
@given(rows=st.integers(1, 80), width=st.integers(1, 70), out=st.integers(1, 70))
def test_a_prepared_product_in_bfloat16_is_the_linear_layers(rows: int, width: int, out: int) -> None:
    use(Kernels(decode_bfloat16="packed"))
    layer, x = nn.Linear(width, out), torch.randn(rows, width)
    with torch.inference_mode():
        found = product(layer.weight, layer.bias, torch.bfloat16)(x)
        assert torch.allclose(found.float(), layer(x), atol=5e-2)
        assert torch.equal(product(layer.weight, layer.bias, torch.float32)(x), layer(x))  # float32 goes its own way


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_onednn_has_the_gradients_of_the_linear_layer(bias: bool, frozen: bool) -> None:
    plain, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 7, 24)
    plain.weight.requires_grad_(not frozen)
    fast = copy.deepcopy(plain)
    fast.__class__ = OneDNNLinear
    found = []
    for layer in (plain, fast):
        given_in = x.clone().requires_grad_(True)
        out = layer(given_in)
        (out * out.detach().cos()).sum().backward()
        found.append([out, given_in.grad, *(weight.grad for weight in layer.parameters())])
    for wanted, got in zip(*found, strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_policy_scores_alike_with_either_linear_layer(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_NARROW", 1)
    rows = [TokenRow(str(i), tuple(range(5, 9 + i)), (False, *(True,) * (3 + i))) for i in range(4)]
    use(Kernels(linear="torch"))
    plain = tiny_policy(architecture)
    use(Kernels(linear="onednn"))
    fast = tiny_policy(architecture)
    has_linear = any(isinstance(part, OneDNNLinear) for part in fast.module.modules())
    assert has_linear  # gpt2's layers are another class, but its head is a linear layer
    assert torch.allclose(fast.score_tokens(collate(rows)).logprobs, plain.score_tokens(collate(rows)).logprobs, atol=1e-5)


def test_a_layer_of_another_kind_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    use(Kernels(linear="onednn"))
    model = nn.Sequential(nn.Linear(256, 256), Own(256, 256))
    install(model)
    assert [type(part) for part in model] == [OneDNNLinear, Own]
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(2, 256)).dtype == torch.bfloat16


def test_a_narrow_layer_stays_with_torch_for_trainer_and_sampler_alike() -> None:
    """Serving has no trainer to agree with: there the other products are for everyone, since rows do not depend on each other in them."""
    use(Kernels(linear="onednn", decode="packed"))
    narrow, wide = (nn.Linear(width, 40, bias=False).requires_grad_(False) for width in (255, 256))
    model = nn.Sequential(narrow, wide)
    install(model)
    assert [type(part) for part in model] == [nn.Linear, OneDNNLinear]
    with mock.patch.object(kernels, "_packed", wraps=kernels._packed) as packed:
        for layer in model:
            product(layer.weight, None, torch.float32)
        assert [call.args[0].shape[1] for call in packed.call_args_list] == [256]
        use(Kernels(decode="packed"))
        product(narrow.weight, None, torch.float32)
        assert [call.args[0].shape[1] for call in packed.call_args_list] == [256, 255]


@pytest.mark.parametrize(
    ("products", "exact"),
    [
        (Kernels(), True),
        (Kernels(decode="transposed"), True),
        (Kernels(linear="onednn", decode="packed"), True),
        (Kernels(decode="packed"), False),
        (Kernels(linear="onednn"), False),
        (Kernels(linear="onednn", decode="transposed"), False),
    ],
)
def test_what_was_recorded_with_other_products_than_the_trainers_is_not_trusted(products: Kernels, exact: bool) -> None:
    use(products)
    policy = tiny_policy()
    prompt = Prompt("p", (Message("user", "hello"),), plain=True)
    rollout = LocalEngine(0).rollout(policy, [PromptRow(prompt, policy.codec.prompt(prompt))], Sampling(4), samples_per_prompt=1, step=0)
    assert rollout.exact == exact
