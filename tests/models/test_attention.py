"""The layout that keeps padding out and computes common beginnings once, against the plain forward of transformers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from alignkit.data.collate import collate, pack
from alignkit.errors import ModelError
from alignkit.interfaces import TokenBatch
from alignkit.models.attention import hidden_states, lay_out, prepare
from alignkit.types import TokenRow
from tests.fakes import ARCHITECTURES
from tests.invariants.vivid import Architecture, vivid_folder, vivid_policy


def row(*ids: int) -> TokenRow:
    return TokenRow("", ids, (True,) * len(ids))


def test_a_common_beginning_is_in_line_once() -> None:
    layout = lay_out(collate([row(5, 6, 7, 8), row(9), row(5, 6, 3)]))
    assert len(layout.tokens) == 4 + 1 + 1
    assert torch.equal(layout.line[0, :2], layout.line[2, :2])
    assert layout.line[0, 2] != layout.line[2, 2]
    assert sorted(layout.positions.tolist()) == [0, 0, 1, 2, 2, 3]


def test_the_same_word_after_another_beginning_is_another_token() -> None:
    assert len(lay_out(collate([row(5, 6, 7), row(4, 6, 7)])).tokens) == 6


def test_documents_of_a_packed_row_begin_anew() -> None:
    layout = lay_out(pack([[row(5, 6), row(5, 6, 7)], [row(8)]]))
    assert len(layout.tokens) == 4
    assert layout.line[0].tolist()[:2] == layout.line[0].tolist()[2:4]


@given(st.lists(st.lists(st.integers(4, 6), min_size=1, max_size=7), min_size=1, max_size=9))
def test_every_place_finds_its_own_token_and_all_that_precedes_it(texts: list[list[int]]) -> None:
    batch = collate([row(*text) for text in texts])
    layout = lay_out(batch)
    beginnings = {tuple(text[: i + 1]) for text in texts for i in range(len(text))}
    assert len(layout.tokens) == len(beginnings)
    in_line = batch.ids.flatten()[layout.tokens]
    for i, text in enumerate(texts):
        assert in_line[layout.line[i, : len(text)]].tolist() == text
        assert layout.positions[layout.line[i, : len(text)]].tolist() == list(range(len(text)))
    # Each token attends in one row of attention, in which all that precedes it stands before it.
    width = layout.rows.shape[1]
    for token, place in enumerate(layout.first.tolist()):
        before = in_line[layout.rows[place // width, : place % width + 1]].tolist()
        assert tuple(before) in beginnings
        assert layout.rows.flatten()[place] == token


def plain(model: torch.nn.Module, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(4, 9), min_size=2, max_size=12), min_size=1, max_size=6))
def test_hidden_states_are_those_of_each_row_by_itself(architecture: Architecture, texts: list[list[int]]) -> None:
    policy = vivid_policy(architecture, trainable=False)
    plainly = AutoModelForCausalLM.from_pretrained(vivid_folder(architecture)).eval()
    with torch.no_grad():
        hidden, line = hidden_states(policy.module, collate([row(*text) for text in texts]))
        module: Any = policy.module  # a transformers model, which torch knows as a Module
        head = module.get_output_embeddings()
        for i, text in enumerate(texts):
            assert torch.allclose(head(hidden[line[i, : len(text)]]), plain(plainly, text), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_rows_by_themselves(architecture: Architecture) -> None:
    policy = vivid_policy(architecture)
    texts = [[5, 6, 7, 8, 9], [5, 6, 7, 4], [5, 6], [9, 9, 9, 9, 9, 9]]
    batch = collate([row(*text) for text in texts])
    weights = list(policy.module.parameters())

    def gradients(batches: list[TokenBatch]) -> list[Tensor]:
        loss = sum((policy.score_tokens(batch).logprobs.sum() for batch in batches), torch.zeros(()))
        return list(torch.autograd.grad(loss, weights))

    together, alone = gradients([batch]), gradients([collate([row(*text)]) for text in texts])
    for found, wanted in zip(together, alone, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max().clamp(min=1.0)))


def test_a_sliding_window_is_respected() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=3, **shape)).eval()
    ids = list(range(4, 16))
    with torch.no_grad():
        want = plain(model, ids)
        prepare(model)
        hidden, line = hidden_states(model, collate([row(*ids), row(4, 5)]))
        assert torch.allclose(model.lm_head(hidden[line[0]]), want, atol=1e-5)


def test_what_would_be_computed_wrongly_is_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, **shape))
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        prepare(model)
    model.config.final_logit_softcapping = None
    prepare(model)
    with pytest.raises(ModelError, match="softcap"):
        hidden_states(model, collate([row(5, 6, 7)]))
