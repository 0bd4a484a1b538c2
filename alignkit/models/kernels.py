"""Matrix products on this machine: of the ways that give the same numbers, the one that was fastest when it was tried.

Which is fastest differs between processors by a factor of two, and no flag of the processor tells. ``probe`` tries for a fraction of a
second; a run keeps what was found in ``run.json`` and goes on with it, since another way would round differently.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

_log = logging.getLogger(__name__)

Product = Callable[[Tensor], Tensor]
"""From x [... d] to x @ weight.T + bias [... v], for the weight and bias that it was made for."""

Decode = Literal["torch", "transposed", "packed"]
DecodeHalf = Literal["torch", "packed"]

_CLEARLY = 1.5
"""Another precision must be worth it: log-probabilities recorded in it are computed anew before they are trained on."""

_NOTICEABLY = 1.2
"""What is chosen must not hang on a measurement's noise, since the same run would round differently the next day."""

_NO_SLOWER = 0.95
"""What a measurement cannot tell from equally fast."""

_NARROW = 256
"""Below so many inputs, making a product anew for each number of rows costs oneDNN more than it gains."""

_FEW = 64
"""Up to so many rows ``transposed`` is the faster way round."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """``linear``: float32 products of many rows, with gradients. ``decode``: of few rows, as they are, as weight @ x.T, or with a weight
    that is repacked once and used many times; ``decode_bfloat16``: the same in bfloat16. ``bfloat16``: whether products in bfloat16 are
    faster than in float32. ``fused``: whether what decoding does between its products is compiled.
    """

    linear: Literal["torch", "onednn"] = "torch"
    decode: Decode = "torch"
    decode_bfloat16: DecodeHalf = "torch"
    bfloat16: bool = False
    fused: bool = False

    @property
    def exact(self) -> bool:
        """Whether log-probabilities recorded while sampling may be trusted: where sampler and trainer multiply through two libraries, a
        sequence may amplify what they round differently.
        """
        return (self.decode == "packed") == (self.linear == "onednn")


_chosen: Kernels | None = None


def use(kernels: Kernels) -> None:
    """Compute in this process as ``kernels`` says, as ``torch.set_num_threads`` is for the process."""
    global _chosen
    _chosen = kernels


def chosen() -> Kernels:
    """What this process computes with; the first call tries what is fastest, unless ``use`` came before."""
    if _chosen is None:
        use(probe())
    assert _chosen is not None
    return _chosen


@torch.inference_mode()
def probe() -> Kernels:
    """Try the ways of multiplying on this machine, for about a second."""
    if torch.cuda.is_available():
        return _of_gpu()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1536, 576, generator=generator)
    many, few = torch.randn(512, 576, generator=generator), [torch.randn(rows, 576, generator=generator) for rows in (4, 16)]
    slope = torch.randn(512, 1536, generator=generator)
    has_onednn, has_bfloat16 = _has_onednn(many, weight), _has_bfloat16()

    # x, the gradient to it and that to the weight: what a training step is made of.
    factors = (many, weight), (slope, weight.t()), (slope.t(), many.t())
    training: dict[str, Callable[[], object]] = {"torch": lambda: [nn.functional.linear(*pair) for pair in factors]}
    if has_onednn:
        training["onednn"] = lambda: [_onednn(*pair) for pair in factors]
    if has_bfloat16:  # without instructions for it, it is slower by a factor, and so would be the trying
        halves = [(left.bfloat16(), right.bfloat16()) for left, right in factors]
        training["bfloat16"] = lambda: [nn.functional.linear(*pair) for pair in halves]
    # As in decoding, where rows leave, and every weight comes from memory: more of them than a cache holds.
    weights = [weight + i for i in range(24)]
    decoding: dict[str, Callable[[], object]] = {
        "torch": partial(_each, [partial(nn.functional.linear, weight=each) for each in weights], few),
        "transposed": partial(_each, [partial(_transposed, weight=each) for each in weights], few),
    }
    if has_onednn:
        decoding["packed"] = partial(_each, [partial(_onednn, weight=_packed(each)) for each in weights], few)
    if has_onednn and has_bfloat16:
        few_halves, half_weights = [each.bfloat16() for each in few], [each.bfloat16() for each in weights]
        decoding["bfloat16"] = partial(_each, [partial(nn.functional.linear, weight=each) for each in half_weights], few_halves)
        decoding["packed bfloat16"] = partial(_each, [partial(_onednn, weight=_packed(each)) for each in half_weights], few_halves)
    return _fastest(_seconds(training), _seconds(decoding))


def _each(products: Sequence[Product], inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        for multiply in products:
            multiply(x)


def _fastest(training: Mapping[str, float], decoding: Mapping[str, float]) -> Kernels:
    """The choice, from the seconds of each way. oneDNN is taken for both or for neither: a sampler with other products than the trainer's
    is not trusted, and to compute its log-probabilities anew costs more than it gains.
    """
    linear: Literal["torch", "onednn"] = "torch"
    decode: Decode = "transposed" if decoding["torch"] > _NOTICEABLY * decoding["transposed"] else "torch"
    if "onednn" in training:
        gains = training["torch"] / training["onednn"], decoding[decode] / decoding["packed"]
        if max(gains) > _NOTICEABLY and min(gains) > _NO_SLOWER:
            linear, decode = "onednn", "packed"
    half: DecodeHalf = "torch"
    # What was sampled in bfloat16 is computed anew in any case, whatever its products.
    if "bfloat16" in decoding and decoding["bfloat16"] > _NOTICEABLY * decoding["packed bfloat16"]:
        half = "packed"
    bfloat16 = "bfloat16" in training and training[linear] > _CLEARLY * training["bfloat16"]
    return Kernels(linear=linear, decode=decode, decode_bfloat16=half, bfloat16=bfloat16)


def plain() -> Kernels:
    """Torch's own products, which no measurement chooses; a GPU's are those of ``probe``, which measures nothing there either."""
    return _of_gpu() if torch.cuda.is_available() else Kernels()


def for_serving() -> Kernels:
    """Products in which no row's numbers depend on how many rows there are, where oneDNN has them: what one is answered does not hang on
    who else asks. A matrix product of torch's own splits its sums by the number of rows.
    """
    if torch.cuda.is_available():
        return _of_gpu()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        there = _has_onednn(torch.randn(16, 576, generator=generator), torch.randn(1536, 576, generator=generator))
    return Kernels(decode="packed" if there else "torch", decode_bfloat16="packed" if there and _has_bfloat16() else "torch")


def again(before: Mapping[str, Any]) -> Kernels:
    """What a run began with, where it is there; what is fastest now where it is not, as after a move to a machine without a C compiler."""
    try:
        kernels = Kernels(**before)
    except TypeError:  # of another version
        return probe()
    if not _has_bfloat16():  # the numbers stay those of the run's precision; only the order in which weights lie is another
        kernels = replace(kernels, decode_bfloat16="torch")
    sample = torch.ones(2, 16)
    wants_onednn = kernels.linear == "onednn" or "packed" in (kernels.decode, kernels.decode_bfloat16)
    lacks_onednn = wants_onednn and not _has_onednn(sample, sample)
    lacks_compiler = kernels.fused and not compiles(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return probe() if lacks_onednn or lacks_compiler else kernels


def _of_gpu() -> Kernels:
    return Kernels(bfloat16=torch.cuda.is_bf16_supported(), fused=compiles(torch.device("cuda")))


def compiles(device: torch.device) -> bool:
    """Whether ``torch.compile`` works here: it needs a C compiler, and Python's headers, beside Triton."""
    x = torch.ones(2, 3, device=device)
    try:
        # Another function each time: of one that failed before, torch remembers that it did.
        return bool(torch.equal(torch.compile(lambda x: x * 2 + 1)(x), x * 2 + 1))
    except RuntimeError as error:  # of which dynamo's errors are some
        _log.warning("torch.compile does not work here, so decoding goes on without it: %s", str(error).strip().split("\n")[0])
        return False


def _seconds(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The fastest of several goes of each, turn by turn, so that what else the machine does is felt by all of them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(6):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - started)
    return {name: min(seconds) for name, seconds in found.items()}


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias the other way round, in which torch's library is the faster one where x has few rows."""
    out = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return out.t().contiguous()


def _has_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's products, which torch does not export, are there and right."""
    want = nn.functional.linear(x, weight)
    try:
        found = [_onednn(x, weight, None), _onednn(x, _packed(weight), None)]
    except (AttributeError, RuntimeError):  # a torch without the operator, or without a oneDNN behind it
        return False
    return all(torch.allclose(one, want, rtol=1e-4, atol=1e-4) for one in found)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with oneDNN; ``weight`` [v d] plain or from ``_packed``."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _of_two_rows_or_more(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``_onednn``, where a row's numbers are the same whatever rows are beside it: a single one would be added up in another order."""
    return _onednn(x, packed, bias) if len(x) > 1 else _onednn(torch.cat((x, x)), packed, bias)[:1]


def _has_bfloat16() -> bool:
    """Whether oneDNN is there and this processor has instructions of bfloat16 for it: it needs more than AVX2."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(weight: Tensor) -> Tensor:
    """``weight`` [v d] in the order in which oneDNN reads it when there are few rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return packed


class _OneDNNProduct(torch.autograd.Function):
    """Linear layer whose three products all go through oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return (
            _onednn(flat, weight.t(), None).view(x.shape) if wants_x else None,
            _onednn(flat.t(), rows.t(), None) if wants_weight else None,
            flat.sum(dim=0) if wants_bias else None,
        )


class OneDNNLinear(nn.Linear):
    """A linear layer that multiplies with oneDNN."""

    def forward(self, input: Tensor) -> Tensor:
        """x @ weight.T + bias."""
        if torch.is_autocast_enabled(input.device.type) or input.dtype != torch.float32:
            return super().forward(input)
        apply: Callable[..., Tensor] = _OneDNNProduct.apply  # torch leaves it untyped
        return apply(input, self.weight, self.bias)


class FusedRMSNorm(nn.Module):
    """Llama's RMSNorm in one call, forward and backward."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states / their root mean square * weight."""
        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class FusedRMSNormBeforeProducts(FusedRMSNorm):
    """One whose numbers only products see: they are cast for all of them at once, and not once for each."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The same in the type of the products."""
        normed, device = super().forward(hidden_states), hidden_states.device.type
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def install(model: nn.Module) -> None:
    """Let the layers of a float32 model compute as was chosen on the CPU, and as is fastest on a GPU."""
    on_gpu = next(model.parameters()).is_cuda
    for name, part in model.named_modules():
        if type(part) is nn.Linear and _trains_with_onednn(part.weight):
            part.__class__ = OneDNNLinear
        if on_gpu and type(part) in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            # Those of a block; a norm of queries and keys, or the last one, is read otherwise.
            part.__class__ = FusedRMSNormBeforeProducts if name.endswith("_layernorm") else FusedRMSNorm


def _trains_with_onednn(weight: Tensor) -> bool:
    """Whether a layer with this ``weight`` [v d] does, in a float32 model on the CPU."""
    return chosen().linear == "onednn" and weight.shape[1] >= _NARROW


def product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, installed: bool = True) -> Product:
    """x @ weight.T + bias in ``dtype`` without gradients, for many calls: what casting and repacking costs is paid here.

    ``installed``: whether it is the product of a layer that ``install`` knows; another one trains through torch whatever was chosen.
    """
    weight = weight.detach().to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    # Where the trainer goes through oneDNN, the sampler does so in the same layers.
    alike = chosen().linear == "torch" or (installed and _trains_with_onednn(weight))
    packs = {torch.float32: chosen().decode == "packed" and alike, torch.bfloat16: chosen().decode_bfloat16 == "packed"}
    if weight.device.type == "cpu" and packs.get(dtype):
        packed = _packed(weight)
        return _of_rows(lambda x: _of_two_rows_or_more(x.to(dtype), packed, bias))
    if weight.device.type == "cpu" and chosen().decode == "transposed" and dtype == torch.float32:
        return _of_rows(lambda x: (_transposed if len(x) <= _FEW else nn.functional.linear)(x.to(dtype), weight, bias))
    return lambda x: nn.functional.linear(x.to(dtype), weight, bias)


def _of_rows(multiply: Product) -> Product:
    """``multiply``, which counts rows [n d], for any x [... d]: a forward of transformers' has a dimension of batches before them."""
    return lambda x: multiply(x) if x.dim() == 2 else multiply(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
