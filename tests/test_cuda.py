"""What must hold on a GPU; where there is none, this is skipped."""

import pytest
import torch

from alignkit.data.collate import collate
from alignkit.models.causal_lm import load
from alignkit.models.config import Precision, TuningConfig
from alignkit.rollout import LocalEngine
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
