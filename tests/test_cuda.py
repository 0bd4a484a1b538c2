"""What must hold on a GPU; where there is none, this is skipped."""

import pytest
import torch

from alignkit.data.collate import collate
from alignkit.models.causal_lm import load
from alignkit.models.config import Precision, TuningConfig
from alignkit.rollout import LocalEngine
from alignkit.rollout import decoder as module
from alignkit.rollout.decoder import Decoder, Event, Request
from alignkit.rollout.launch import CallByCall
from alignkit.types import Message, Prompt, PromptRow, Sampling, TokenRow
from tests.fakes import ARCHITECTURES, tiny_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_samplers_log_probabilities_are_the_trainers(architecture: str, precision: Precision, bound: float) -> None:
    policy = load(tiny_folder(architecture), tuning=TuningConfig(), precision=precision, trainable=True, seed=0)
    prompts = [Prompt(str(i), (Message("user", "abcdefgh"[: i + 1]),), plain=True) for i in range(6)]
    rows = [PromptRow(prompt, policy.codec.prompt(prompt)) for prompt in prompts]
    rollout = LocalEngine(0).rollout(policy, rows, Sampling(12), samples_per_prompt=2, step=0)
    with torch.no_grad():
        scored = policy.score_tokens(rollout.batch).logprobs.cpu()
    assert float((scored - rollout.logprobs).abs()[rollout.batch.loss_mask].mean()) < bound


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_cpu(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([TokenRow(str(i), tuple(range(4, 9 + i)), (False, *(True,) * (4 + i))) for i in range(5)])

    def scores() -> torch.Tensor:
        policy = load(tiny_folder(architecture), tuning=TuningConfig(), precision="float32", trainable=True, seed=0)
        return policy.score_tokens(batch).logprobs.detach().cpu()

    on_gpu = scores()
    monkeypatch.setattr("alignkit.models.causal_lm.pick_device", lambda: torch.device("cpu"))
    assert torch.allclose(on_gpu, scores(), atol=1e-3)


def requests() -> list[Request]:
    """Many lengths; some are stopped."""
    return [
        Request(tuple(range(8, 11 + i % 7)), 3 + 5 * (i % 11), 1.0, tuple(range(80, 90)) if i % 3 == 0 else (), noise_key=i)
        for i in range(60)
    ]


def drawn(architecture: str) -> dict[int, list[Event]]:
    policy = load(tiny_folder(architecture), tuning=TuningConfig(), precision="float32", trainable=True, seed=0)
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=24)
        found: dict[int, list[Event]] = {decoder.add(one): [] for one in requests()}
        while decoder.busy:
            for event in decoder.step():
                found[event.request].append(event)
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_recorded_step_draws_what_its_calls_draw(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = drawn(architecture)
    monkeypatch.setattr(module, "launch_on", lambda model: CallByCall())
    for number, want in drawn(architecture).items():
        got = recorded[number]
        assert [(event.token, event.finished) for event in got] == [(event.token, event.finished) for event in want]
        assert [event.logprob for event in got] == pytest.approx([event.logprob for event in want], abs=1e-4)


def test_nothing_in_the_loop_of_decoding_waits_for_the_device() -> None:
    policy = load(tiny_folder("llama"), tuning=TuningConfig(), precision="bfloat16", trainable=True, seed=0)
    with policy.decoding() as model:
        decoder = Decoder(model, max_rows=24)
        left = len([decoder.add(one) for one in requests()])
        torch.cuda.set_sync_debug_mode("error")
        try:
            while decoder.busy:
                left -= sum(event.finished is not None for event in decoder.step())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert left == 0
