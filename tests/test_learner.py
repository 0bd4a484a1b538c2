from functools import partial

import pytest
import torch
from torch import Tensor, nn

from alignkit.adamw import AdamWConfig
from alignkit.learner import Learner
from alignkit.types import Metrics


class Line(nn.Module):
    """y = w x, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0]))


def fit(learner: Learner, line: Line, parts: list[list[float]], count: int) -> dict[str, float]:
    def loss(part: list[float]) -> tuple[Tensor, Metrics]:
        share = torch.cat([(line.w * x - 2.0 * x) ** 2 for x in part]).sum() / count
        return share, {"loss": float(share.detach()), "share": len(part) / count}

    return learner.step(lambda tokens: [partial(loss, part) for part in parts])


def test_a_step_does_not_depend_on_how_it_was_split() -> None:
    data, weights, norms = [1.0, 2.0, 3.0, 4.0], [], []
    for parts in ([data], [data[:1], data[1:]], [[x] for x in data]):
        line = Line()
        metrics = fit(Learner(line, AdamWConfig(learning_rate=0.1), steps=10), line, parts, 4)
        weights.append(float(line.w))
        norms.append(metrics["optimizer/grad_norm"])
        assert metrics["loss"] == pytest.approx(7.5)  # mean of (x - 2x)^2 over 1, 2, 3, 4
        assert metrics["share"] == pytest.approx(1.0)
    assert weights == pytest.approx([weights[0]] * 3)
    assert norms == pytest.approx([15.0] * 3)  # mean of 2 (w x - 2 x) x


@pytest.mark.parametrize("x", [float("nan"), 1e30])  # the square of the second is infinite
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(x: float) -> None:
    line = Line()
    learner = Learner(line, AdamWConfig(learning_rate=0.1), steps=10)
    fit(learner, line, [[1.0]], 1)
    before = {name: tensor.clone() for name, tensor in learner.state().tensors.items()}
    values = learner.state().values
    assert fit(learner, line, [[1.0], [x]], 2)["guard/skipped_steps"] == 1.0
    assert learner.state().values == values  # the schedule waits, too
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state().tensors.items())
    assert fit(learner, line, [[1.0]], 1)["guard/skipped_steps"] == 0.0  # and the next step does not carry it on

    plain = Line()
    other = Learner(plain, AdamWConfig(learning_rate=0.1), steps=10)
    for _ in range(2):
        fit(other, plain, [[1.0]], 1)
    assert torch.equal(line.w, plain.w)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    line = Line()
    learner = Learner(line, AdamWConfig(learning_rate=1.0, warmup=0.2, floor=0.1), steps=10)
    rates = [fit(learner, line, [[0.0]], 1)["optimizer/learning_rate"] for _ in range(10)]
    assert rates[0] < rates[1] < rates[2] == 1.0
    assert rates[-1] < 0.15


def test_weights_by_name_may_have_their_own_rate() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    two = Two()
    before = float(two.body.weight.detach()), float(two.head.weight.detach())
    learner = Learner(two, AdamWConfig(learning_rate=1e-3, decay="constant"), steps=10, peaks={"head.": 1e-1})
    learner.step(lambda tokens: [lambda: ((two.body.weight + two.head.weight).sum(), {})])
    # AdamW's first step moves each weight by its learning rate.
    assert before[0] - float(two.body.weight.detach()) == pytest.approx(1e-3, rel=1e-3)
    assert before[1] - float(two.head.weight.detach()) == pytest.approx(1e-1, rel=1e-3)


def test_a_restored_learner_goes_on_exactly() -> None:
    def make() -> tuple[Line, Learner]:
        line = Line()
        return line, Learner(line, AdamWConfig(learning_rate=0.1, warmup=0.3), steps=6)

    line, learner = make()
    for x in (1.0, 2.0, 3.0):
        fit(learner, line, [[x]], 1)
    state = learner.state()
    kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
    for x in (4.0, 5.0):
        fit(learner, line, [[x]], 1)
    again, restored = make()
    restored.load_state(type(state)(kept, state.values))
    for x in (4.0, 5.0):
        fit(restored, again, [[x]], 1)
    assert torch.equal(line.w, again.w)
