"""Frozen weights kept in 8 or 4 bits, with the factors of an adapter kept exact.

    W~ = Q(W - B0 A0) + B0 A0        Q: 64 numbers in a row of memory share one fp32 scale

`8bit` has even steps (8.5 bits a number in all), `4bit` is NF4, the 16 quantiles of a normal
distribution (4.5 bits; Dettmers et al. 2023, QLoRA, section 3). Where nothing low-rank is trained
B0 A0 = 0. The residual is what QPiSSA quantises (Meng et al. 2024, section 4): it is smaller than
W, so that Q errs less, and the factors that are trained start from the original's own.

bitsandbytes does the quantising, on tensors of any shape, so that convolutions, which its layers
and torchao's leave out, are quantised too. A layer makes W~ anew for every use, backward included:
autograd keeps neither W~ nor, since nothing here is trained, the input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from recast.errors import Refused
from recast.lowrank import LowRank

BASES = ("full", "8bit", "4bit")
BLOCK = 64
BITS = {"8bit": 8 + 32 / BLOCK, "4bit": 4 + 32 / BLOCK}
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.", "encoder.layers.", "text_model.encoder.")
TRUSTED = {"8bit": 0.02, "4bit": 0.2}  # relative error of an even ramp above which Q is broken

# whoever imports it first, it warns of an optional kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Packed:
    """A quantised tensor: the library's numbers and its state (scales, dtype), and the shape."""

    data: Tensor
    state: Any
    shape: torch.Size
    unpack: Callable[[Tensor, Any], Tensor]

    def dense(self) -> Tensor:
        """The tensor again, in the dtype that was asked for."""
        return self.unpack(self.data, self.state).view(self.shape)

    @property
    def bytes(self) -> int:
        """What the numbers and their scales take."""
        return self.data.nbytes + self.state.absmax.nbytes


def quantise(weight: Tensor, base: str, dtype: torch.dtype) -> Packed:
    """Q(weight) in "8bit" or "4bit"; `dtype` is that of the dense tensor it gives back."""
    library = _bitsandbytes().functional
    # flat: on a CPU bitsandbytes 0.50.2 gives rows that are no multiple of BLOCK the wrong scales
    value = weight.detach().flatten()
    if base == "4bit":
        data, state = library.quantize_4bit(value, blocksize=BLOCK, quant_type="nf4")
        unpack = library.dequantize_4bit
    else:
        steps = _even_steps(value.device)
        data, state = library.quantize_blockwise(value, code=steps, blocksize=BLOCK)
        unpack = library.dequantize_blockwise
    state.dtype = dtype
    return Packed(data, state, weight.shape, unpack)


def check_base(base: str, device: str | torch.device) -> str:
    """The library's name and version, "" for "full"; Refused, with the reason, if it cannot run."""
    if base not in BASES:
        raise Refused(f"{base!r} is no base to train on: choose from {', '.join(BASES)}.")
    if base == "full":
        return ""
    try:
        library = _bitsandbytes()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise Refused(
            f"a base of {base} needs bitsandbytes, which cannot be imported here "
            f"({_first_line(error)}): pip install 'recast[quant]', or give --base full."
        ) from error
    name = f"bitsandbytes {library.__version__}"
    ramp = torch.linspace(-1, 1, 90 * 101, device=device).view(90, 101)
    try:
        off = relative(quantise(ramp, base, torch.float32).dense(), ramp)
        reason = f"a ramp comes back with an error of {100 * off:.0f} %"
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        off, reason = float("nan"), _first_line(error)
    if not off < TRUSTED[base]:
        raise Refused(
            f"{name} cannot keep weights in {base} on {device} ({reason}): "
            "give --base full, or another --device."
        )
    return name


class Quantised(nn.Module):
    """A frozen linear or convolution layer whose weight W~ is quantised.

    `start` are the exact factors B0 A0 that the quantised residual lacks. `lent` answers in the
    place of W~ where it is set.
    """

    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d,
        weight: Tensor,
        base: str,
        dtype: torch.dtype,
        start: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.base, self.dtype, self.shape, self.start = base, dtype, weight.shape, start
        self.bias = layer.bias
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        rest = weight if start is None else weight - start.dense(weight.shape)
        self.packed = quantise(rest, base, dtype if start is None else torch.float32)
        self.lent: Callable[[], Tensor] | None = None

    def dense(self) -> Tensor:
        """W~ in the trunk's dtype, rounded to it once."""
        rest = self.packed.dense()
        if self.start is not None:
            rest += self.start.dense(rest.shape)
        return rest.to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I[, kh, kw]), made anew for each use."""
        return self.dense() if self.lent is None else self.lent()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """This layer's map with another weight: its strides and padding, or none."""
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def pull(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient with respect to an input of this shape."""
        weight = self.weight.to(grad.dtype)
        if weight.ndim == 2:
            return grad @ weight
        return conv2d_input(shape, weight, grad, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """W~ x + bias."""
        return _Frozen.apply(x, self)

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.base}"


class _Frozen(torch.autograd.Function):
    """A layer's product: its backward pass dequantises again, for the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantised) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pull(grads[0], ctx.shape), None


@dataclass(frozen=True)
class Quantiser:
    """Which layers of `parts` are quantised and how; `recast.model` asks for each weight it reads.

    starts: the factors that begin at each (part, module). whole: those that are trained in full
    rank, which stay as they are.
    """

    base: str
    dtype: torch.dtype
    device: torch.device
    starts: Mapping[tuple[str, str], LowRank]
    whole: frozenset[tuple[str, str]] = frozenset()
    parts: frozenset[str] = frozenset({"unet"})

    def __call__(self, part: str, name: str, layer: nn.Module, weight: Tensor) -> Quantised | None:
        """The layer with this weight quantised, or None where it stays as it is."""
        at = (part, name)
        if part not in self.parts or at in self.whole or not in_block(name) or not _fits(layer):
            return None
        start = self.starts.get(at)
        if start is not None:
            up, down = (f.to(self.device, torch.float32) for f in (start.up, start.down))
            start = LowRank(up, down)
        value = weight.to(self.device, torch.float32)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return Quantised(layer, value, self.base, self.dtype, start)


def in_block(name: str) -> bool:
    """Whether a module is in a block: those outside are never quantised.

    The layers around them (in, out, time, label) are few, and all that the network says of t and
    of its answer passes through them.
    """
    return name.startswith(BLOCKS)


@contextmanager
def unquantised(module: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Inside, quantised layers answer with the weights that `read` returns for their names.

    One dense weight exists at a time, so the exact network runs in the memory of the quantised.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, Quantised)}
    for name, layer in found.items():
        layer.lent = partial(read, name)
    try:
        yield
    finally:
        for layer in found.values():
            layer.lent = None


@dataclass(frozen=True)
class Tally:
    """Numbers of a network, those in quantised layers, bytes before and after."""

    numbers: int
    quantised: int
    before: int
    after: int


def tally(module: nn.Module, dtype: torch.dtype) -> Tally:
    """Count a network's weights; `before` is what they would take in the trunk's dtype."""
    layers = [layer for layer in module.modules() if isinstance(layer, Quantised)]
    many = sum(layer.shape.numel() for layer in layers)
    rest = sum(parameter.numel() for parameter in module.parameters())
    kept = sum(parameter.nbytes for parameter in module.parameters())
    packed = sum(layer.packed.bytes for layer in layers)
    return Tally(many + rest, many, (many + rest) * dtype.itemsize, kept + packed)


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


@cache
def _bitsandbytes() -> ModuleType:
    import bitsandbytes

    return bitsandbytes


@cache
def _even_steps(device: torch.device) -> Tensor:
    """The 256 numbers from -1 to 1 that a byte stands for."""
    return _bitsandbytes().functional.create_linear_map(signed=True, total_bits=8).to(device)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
