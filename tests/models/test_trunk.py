"""What frozen layers make of a text is computed once, and changes nothing but the time."""

import copy

import pytest
import torch

from alignkit.data.collate import collate, pack
from alignkit.models import trunk
from alignkit.models.config import TuningConfig
from alignkit.models.scalar import ScalarModel
from alignkit.models.trunk import keep_states, shared_trunk
from alignkit.types import TokenRow
from tests.fakes import ARCHITECTURES, tiny_policy

ADAPTERS = TuningConfig(kind="lora", rank=4, top_layers=1)
ROWS = [TokenRow(str(i), tuple(range(5, 9 + i)), (False, *(True,) * (3 + i))) for i in range(4)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_from_known_states_is_the_forward(architecture: str) -> None:
    policy = tiny_policy(architecture, tuning=ADAPTERS)
    critic = ScalarModel(tiny_policy(architecture, tuning=ADAPTERS).module.base_model, policy.codec, "float32")
    shared = shared_trunk(policy.module, critic.backbone, exact=True)
    assert shared is not None
    batch = collate(ROWS)
    known = shared.under(batch, shared.states(batch))
    for figure in (lambda one: policy.score_tokens(one).logprobs, critic.values, lambda one: policy.reference().score_tokens(one).logprobs):
        assert torch.allclose(figure(known), figure(batch), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_states_are_what_the_forward_reads(architecture: str) -> None:
    policy = tiny_policy(architecture, tuning=ADAPTERS)
    shared = shared_trunk(policy.module, exact=True)
    assert shared is not None
    batch = collate(ROWS)
    states = shared.states(batch)
    plain = policy.score_tokens(batch).logprobs
    assert not torch.allclose(policy.score_tokens(shared.under(batch, states + torch.randn(states.shape))).logprobs, plain, atol=1e-3)
    stranger = tiny_policy(architecture, tuning=ADAPTERS)  # states are not for a model that has not said so
    assert torch.equal(stranger.score_tokens(shared.under(batch, torch.randn(states.shape))).logprobs, plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same(architecture: str) -> None:
    found = []
    for known in (False, True):
        policy = tiny_policy(architecture, tuning=ADAPTERS)
        shared = shared_trunk(policy.module, exact=True)
        assert shared is not None
        batch = collate(ROWS)
        policy.score_tokens(shared.under(batch, shared.states(batch)) if known else batch).logprobs.sum().backward()
        found.append({name: weight.grad for name, weight in policy.module.named_parameters() if weight.requires_grad})
    plain, fast = found
    assert plain.keys() == fast.keys()
    for name, grad in plain.items():
        other = fast[name]
        assert grad is not None
        assert other is not None
        assert torch.allclose(other, grad, atol=1e-5), name


def test_models_that_share_their_layers_have_them_in_memory_once() -> None:
    policy, other = tiny_policy(tuning=ADAPTERS), tiny_policy(tuning=ADAPTERS)
    assert shared_trunk(policy.module, other.module, exact=True) is not None
    ours, theirs = dict(policy.module.named_parameters()), dict(other.module.named_parameters())
    shared = [name for name, weight in ours.items() if weight.data_ptr() == theirs[name].data_ptr()]
    assert "model.embed_tokens.weight" in shared
    assert not [name for name in shared if ours[name].requires_grad]


def test_where_layers_are_trained_nothing_is_shared() -> None:
    assert shared_trunk(tiny_policy().module, exact=True) is None
    everywhere = TuningConfig(kind="lora", rank=4)
    assert shared_trunk(tiny_policy(tuning=everywhere).module, exact=True) is None


def test_a_model_with_other_weights_computes_for_itself() -> None:
    policy, other = tiny_policy(tuning=ADAPTERS), tiny_policy(tuning=ADAPTERS)
    with torch.no_grad():
        dict(other.module.named_parameters())["model.layers.0.mlp.down_proj.weight"] += 0.1
    before = copy.deepcopy(other.module.state_dict())
    shared = shared_trunk(policy.module, other.module, exact=True)
    assert shared is not None
    batch = collate(ROWS)
    own = other.score_tokens(batch).logprobs
    assert torch.equal(other.score_tokens(shared.under(batch, shared.states(batch))).logprobs, own)
    assert all(torch.equal(weight, before[name]) for name, weight in other.module.state_dict().items())


def test_states_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(tuning=ADAPTERS)
    shared = shared_trunk(policy.module, exact=True)
    assert shared is not None
    batch = collate(ROWS)
    assert shared.fits(batch)
    monkeypatch.setattr(trunk, "_MOST", batch.ids.numel() * 32 - 1)
    assert not shared.fits(batch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_are_read_again_begin_above_the_frozen_layers_however_they_are_laid_out(architecture: str) -> None:
    policy, said = tiny_policy(architecture, tuning=ADAPTERS), list[str]()
    kept = keep_states(policy.module, ROWS, exact=True, say=said.append)
    assert said == ["the lowest 1 layers are frozen: what they make of 4 rows is computed once"]
    packed = [[ROWS[3], ROWS[0]], [ROWS[1]]]
    for batch, documents in ((collate(ROWS[::-1]), [[row] for row in ROWS[::-1]]), (pack(packed), packed)):
        known = kept.under(batch, documents)
        assert known.below is not None
        assert torch.allclose(policy.score_tokens(known).logprobs, policy.score_tokens(batch).logprobs, atol=1e-6)


def test_a_row_that_was_not_told_of_is_computed_with_all_that_is_beside_it() -> None:
    kept = keep_states(tiny_policy(tuning=ADAPTERS).module, ROWS[:3], exact=True, say=print)
    batch = collate(ROWS)
    assert kept.under(batch, [[row] for row in ROWS]) is batch


def test_of_layers_that_are_trained_and_of_too_many_rows_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    batch, documents = collate(ROWS), [[row] for row in ROWS]
    assert keep_states(tiny_policy().module, ROWS, exact=True, say=said.append).under(batch, documents) is batch
    monkeypatch.setattr(trunk, "_MOST", sum(map(len, ROWS)) * 32 - 1)
    assert keep_states(tiny_policy(tuning=ADAPTERS).module, ROWS, exact=True, say=said.append).under(batch, documents) is batch
    assert said == []
