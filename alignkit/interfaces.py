"""The interfaces that everything is written against, and the records by which plugins declare their parts.

Torch-free at import: a plugin's declaring module imports this through ``alignkit.api``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from alignkit.types import Metrics, Plan, Prompt, PromptRow, Sample, Sampling, Score, TokenRow

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.context import Context
    from alignkit.models.decoding import Decoding
    from alignkit.models.scalar import ScalarModel

API_VERSION = 1
"""The plugin API that this alignkit speaks. A spec carries the version it was written for."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of tokens, padded on the right.

    ``ids`` [b t] int64; ``mask`` [b t] bool, True at real tokens; ``loss_mask`` [b t] bool, True at trained or scored tokens.
    Masks come from lengths, never from ids: a pad id may equal the end-of-sequence id.
    ``positions`` [b t] int64: where each token stands in its document; a document begins at every 0, and sees nothing of its neighbours
    in the row. None: each row is one document.
    ``below``: what the lowest layers of some models make of the batch, if that is known.
    """

    ids: Tensor
    mask: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None
    below: Below | None = None


@dataclass(frozen=True, slots=True)
class Below:
    """``states`` [b t d] of a batch behind the lowest ``depth`` layers of ``models``, whose forwards may begin there."""

    states: Tensor
    models: tuple[Any, ...]
    depth: int


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Figures of tokens, each at the place of the token it is about; 0 where ``loss_mask`` is False.

    ``logprobs`` [b t] float32 nats; ``entropy`` [b t] float32 nats of the distribution the token was drawn from.
    """

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True, slots=True)
class State:
    """What must be kept to go on exactly: tensors by name, and JSON values. Nothing is pickled."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Stateful(Protocol):
    """Whatever changes while a run runs."""

    def state(self) -> State:
        """A snapshot; tensors may share memory with the live object."""

    def load_state(self, state: State) -> None:
        """Become exactly what ``state`` was taken from."""


class Codec(Protocol):
    """Text to tokens and back. The chat template is applied here and nowhere else."""

    stop_ids: tuple[int, ...]
    template_hash: str

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids that end where the response begins."""

    def sample(self, sample: Sample) -> TokenRow:
        """Prompt and response, ended by the stop token; ``loss_mask`` is True at the response and its stop token."""

    def text(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, after what the tokenizer puts before any text, and with nothing after it."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens left out."""


class Policy(Protocol):
    """The model being aligned, or a frozen one."""

    version: int

    @property
    def codec(self) -> Codec:
        """Text to tokens and back, the same for everyone who uses this policy."""

    @property
    def module(self) -> nn.Module:
        """What a learner trains."""

    def reference(self) -> Policy:
        """A frozen policy with the weights this one started from; ask before the first update."""

    @property
    def exact(self) -> bool:
        """Whether the arithmetic is float32, so that log-probabilities recorded while sampling agree with the training forward."""

    def decoding(self) -> AbstractContextManager[Decoding]:
        """The model to generate with, as its weights are on entering."""

    def score_tokens(self, batch: TokenBatch, *, temperature: float = 1.0, entropy_gradient: bool = False) -> TokenScores:
        """Log-probabilities (logits / temperature) of the tokens under ``loss_mask``, differentiable, and entropies, so if asked for."""

    def save(self, folder: Path) -> None:
        """Write a plain transformers folder: safetensors, tokenizer, chat template."""


class RewardSource(Protocol):
    """Anything that scores samples. It reads messages, so a rule, a model, a service and a person look alike."""

    def score(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """One score a sample, in the same order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one of the samples that a service was asked about, ``index`` in their order.

    ``answered`` False: nobody answered, and ``score`` says why there is no verdict; asked again, somebody may.
    """

    index: int
    score: Score
    answered: bool = True


@runtime_checkable
class RewardService(Protocol):
    """A reward source whose answers arrive one after the other, so that each can be kept before the next is waited for."""

    def answers(self, samples: Sequence[Sample]) -> Iterator[Sequence[Answer]]:
        """One answer a sample, as they come, a batch at a time, in any order."""


class DataSource(Protocol):
    """Rows for a stage."""

    def rows(self) -> Iterable[Row]:
        """The rows, in a fixed order."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it was found; ``origin`` names the place for error messages, such as ``data/prompts.jsonl:12``."""

    values: Mapping[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled responses.

    ``batch``: prompts with their responses, ``loss_mask`` True at response tokens up to and including the stop token.
    ``logprobs`` [b t]: log-probabilities of the sampled tokens under the distribution they were drawn from, 0 elsewhere.
    ``exact``: whether those agree with the training forward (float32, by the same products) or must be computed anew.
    """

    samples: tuple[Sample, ...]
    batch: TokenBatch
    logprobs: Tensor
    exact: bool
    policy_version: int


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with one score a sample."""

    rollout: Rollout
    scores: tuple[Score, ...]


class RolloutEngine(Protocol):
    """Generation, and nothing else."""

    def rollout(self, policy: Policy, prompts: Sequence[PromptRow], sampling: Sampling, *, samples_per_prompt: int, step: int) -> Rollout:
        """Draw ``samples_per_prompt`` responses to each prompt; ``step`` chooses the noise, so a step done again is the same."""


Batch = TypeVar("Batch", contravariant=True)


class Optimizer(Stateful, Protocol[Batch]):
    """An alignment algorithm: one update rule."""

    def update(self, batch: Batch) -> Metrics:
        """Learn from one batch."""

    def save(self, folder: Path) -> None:
        """Write the artifact: the policy or the reward model as it is now."""


class OfflineOptimizer(Optimizer[Batch], Protocol):
    """An optimizer fed with demonstrations (``Sequence[TokenRow]``) or rankings (``Sequence[RankedRows]``)."""

    def validate(self, batch: Batch) -> Metrics:
        """The figures of rows that are not trained on: means over all of them."""


class OnlineOptimizer(Optimizer[ScoredRollout], Protocol):
    """An optimizer fed with rollouts of the policy that it trains."""

    @property
    def policy(self) -> Policy:
        """Whom to draw responses from."""


class Evaluator(Protocol):
    """A measurement of finished stages."""

    def evaluate(self) -> Mapping[str, Any]:
        """The figures, ready for ``evaluation.json``."""


class Tracker(Protocol):
    """A place where metrics go."""

    def log(self, stage: str, step: int, metrics: Metrics) -> None:
        """Take the figures of one step."""

    def close(self) -> None:
        """Flush; nothing follows."""


class Command(Protocol):
    """A command of the command line: a ``click.Command``."""

    name: str | None


Feed = Literal["demonstrations", "rankings", "rollouts"]
Artifact = Literal["policy", "reward_model"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every declaration has: a ``kind`` for the config, one line for ``alignkit plugins``, a frozen config dataclass."""

    kind: str
    summary: str
    config: type
    api: int = API_VERSION


@dataclass(frozen=True, kw_only=True)
class PolicySpec(Spec):
    """How a policy comes into being.

    ``prepare(config, folder)``: the config's own model as a plain transformers folder, written to ``folder`` unless it is one already.
    ``load(config, folder, trainable, seed)``: the policy of such a folder, with fresh adapters where the config asks for them.
    ``load_scalar``, with the same arguments: the reward model of the folder, or a new scalar head on its policy's backbone.
    ``codec(config, folder)``: the codec alone, of such a folder, or of the config's own model when ``folder`` is None.
    """

    prepare: Callable[[Any, Path], Path]
    load: Callable[[Any, Path, bool, int], Policy]
    load_scalar: Callable[[Any, Path, bool, int], ScalarModel]
    codec: Callable[[Any, Path | None], Codec]


@dataclass(frozen=True, kw_only=True)
class RewardSpec(Spec):
    """``build(config, context)`` makes the reward source.

    ``journal``: its answers cannot be had again, or not for nothing, because a person, a judge or a service gives them. They are written
    down before they are used, and read when a step is done again; such a source has no state of its own (``alignkit.journal``).
    """

    build: Callable[[Any, Context], RewardSource]
    journal: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(Spec):
    """``feed``: what the optimizer learns from. ``makes``: what its artifact is. ``plan(config, rows)`` is torch-free."""

    feed: Feed
    makes: Artifact = "policy"
    plan: Callable[[Any, int], Plan]
    build: Callable[[Any, Context], Any]


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """``build(config)`` makes the source; it raises ``DataError`` when the data is not there."""

    build: Callable[[Any], DataSource]


@dataclass(frozen=True, kw_only=True)
class EvaluatorSpec(Spec):
    """``build(config, context)`` makes the evaluator."""

    build: Callable[[Any, Context], Evaluator]


@dataclass(frozen=True, kw_only=True)
class TrackerSpec(Spec):
    """``build(config, folder)`` makes the tracker of the run in ``folder``."""

    build: Callable[[Any, Path], Tracker]


@dataclass(frozen=True)
class NoKeys:
    """The config of what no config names."""


@dataclass(frozen=True, kw_only=True)
class CommandSpec(Spec):
    """``build()`` makes the ``click.Command`` that is called ``kind``, when it is first asked for."""

    config: type = NoKeys
    build: Callable[[], Command]
