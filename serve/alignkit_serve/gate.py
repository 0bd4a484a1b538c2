"""``evaluate: {kind: gate}``: the declaration of a round's last stage. Torch-free; the work is in ``gate_keeper``."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.api import Component, Context, Evaluator, EvaluatorSpec, RewardSource, SettingError, setting
from alignkit.evaluate import WinRateConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig(WinRateConfig):
    """The candidate against the live policy on prompts that nothing was trained on: better, and not at any price, or it is refused."""

    server: str = setting("http://127.0.0.1:8000", "the server whose live policy the run began with")
    key_env: str = setting("ALIGNKIT_API_KEY", "the environment variable that holds a key of it, with the scopes admin and export")
    win_rate_low: float = setting(0.5, "the lower end of the win rate's 95% interval must be above this", at_least=0.0, below=1.0)
    kl_max: float = setting(20.0, "most nats of a sequence that the candidate may be from the live policy", above=0.0)
    reward: Component[RewardSource] | None = setting(None, "another score to report of both policies, such as the trained reward model's")
    toxicity: Component[RewardSource] | None = setting(None, "what says that an answer is toxic, by a score below 0")
    toxicity_rise: float = setting(0.0, "by how much the share of toxic answers may grow", at_least=0.0, at_most=1.0)

    def __post_init__(self) -> None:
        if self.baseline is not None:
            raise SettingError("baseline", "is not for a gate: it compares with the run's own `policy`, the live one; leave it out")


def _build(config: GateConfig, context: Context) -> Evaluator:
    from alignkit_serve.gate_keeper import Gate

    return Gate(config, context)


GATE = EvaluatorSpec(
    kind="gate",
    summary="a candidate against the live policy: promoted by the server, or refused with the figures",
    config=GateConfig,
    build=_build,
)
