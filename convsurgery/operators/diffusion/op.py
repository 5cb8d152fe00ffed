"""The diffusion half of a reaction-diffusion step, in its three forms: explicit, implicit and circulant."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convsurgery.errors import ModelError
from convsurgery.operators.chunks import by_image, worth_chunking
from convsurgery.operators.library import define_op
from convsurgery.operators.precision import no_autocast, result_dtype, widened

__all__ = ["DENSE_CHANNELS", "FORMS", "reaction_diffusion", "spectrum"]

FORMS = ("explicit", "implicit", "circulant")

#: Up to so many channels the circulant operator is faster as a dense convolution than by FFT; see docs/performance.md.
DENSE_CHANNELS = 16


#: Dimensions of the 3-D transform; the last is the one of which half is enough.
_CIRCULANT = (-3, -2, -1)

#: Largest kernel whose KᵀK is applied as one convolution, of twice its size.
_ONE_PASS = 5

#: Values transformed at one time in inference: a MiB, which stays in the cache.
_CHUNK = 1 << 18


def _image_size(x: Tensor, weight: Tensor) -> tuple[int, int]:
    size = (int(x.shape[-2]), int(x.shape[-1]))
    if weight.shape[-2] > size[0] or weight.shape[-1] > size[1]:
        raise ModelError(
            f"a kernel of {tuple(weight.shape[-2:])} pixels does not fit into an image of {size}: with periodic "
            "boundaries it would meet itself"
        )
    return size


def spectrum(weight: Tensor, step: Tensor, size: tuple[int, int], form: str) -> Tensor:
    """What the diffusion multiplies every Fourier coefficient by, at least float32.

    Args:
        weight: K, (C, 1, k, k): a kernel for each channel, or the stencils of the first block row (circulant).
        step: h, ().
        size: height and width of the images.
        form: "implicit": 1 / (1 + h·|F(K)|²), (C, H, W // 2 + 1), eq. 11. "circulant": |F(K)|² over channels too.

    The transform of a kernel that is not centred differs by a phase, which the square forgets.
    """
    kernel = widened(weight).squeeze(1)
    dims, sizes = ((-2, -1), size) if form == "implicit" else (_CIRCULANT, (weight.shape[0], *size))
    power = torch.fft.rfftn(kernel, s=sizes, dim=dims).abs().square()
    factors: Tensor = 1 / (1 + step.to(power.dtype) * power) if form == "implicit" else power
    return factors


def _circular(x: Tensor, weight: Tensor, groups: int, flipped: bool) -> Tensor:
    """Circular cross-correlation with an odd kernel, or with its adjoint."""
    if flipped:
        # The adjoint exchanges input and output channels and turns the kernel around.
        weight = weight.flip(2, 3) if groups != 1 else weight.flip(2, 3).transpose(0, 1)
    rows, columns = weight.shape[2] // 2, weight.shape[3] // 2
    padded = F.pad(x, [columns, columns, rows, rows], "circular")
    return F.conv2d(padded, weight, groups=groups)


def _squared(x: Tensor, weight: Tensor, boundary: str) -> Tensor:
    """KᵀK x for depthwise K, directly."""
    channels = weight.shape[0]
    if boundary == "periodic" and weight.shape[-1] <= _ONE_PASS:
        return _circular(x, autocorrelation(weight), channels, False)
    if boundary == "periodic":
        return _circular(_circular(x, weight, channels, False), weight, channels, True)
    padding = [weight.shape[2] // 2, weight.shape[3] // 2]
    once = F.conv2d(x, weight, None, 1, padding, 1, channels)
    # With a stride of 1 the adjoint of a zero-padded correlation is the one with the kernel turned around.
    return F.conv2d(once, weight.flip(2, 3), None, 1, padding, 1, channels)


def autocorrelation(weight: Tensor) -> Tensor:
    """The kernel (C, 1, 2k − 1, 2k − 1) of KᵀK, of the same dtype."""
    rows, columns = weight.shape[2] - 1, weight.shape[3] - 1
    padded = F.pad(weight.transpose(0, 1), [columns, columns, rows, rows])
    return F.conv2d(padded, weight, groups=weight.shape[0]).transpose(0, 1)


def _circulant_kernel(weight: Tensor) -> Tensor:
    """The dense kernel (C, C, k, k) of the block circulant operator, eq. 12: block (i, j) is stencil (j − i) mod C."""
    channels = torch.arange(weight.shape[0], device=weight.device)
    return weight.squeeze(1)[(channels.unsqueeze(0) - channels.unsqueeze(1)) % weight.shape[0]]


def _circulant_dense(x: Tensor, kernel: Tensor) -> Tensor:
    return _circular(_circular(x, kernel, 1, False), kernel, 1, True)


def _circulant_squared(x: Tensor, weight: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return _circulant_dense(x, _circulant_kernel(weight).to(x.dtype))
    coefficients = torch.fft.rfftn(x, dim=_CIRCULANT)
    fresh = worth_chunking(x, factors, least=0)
    coefficients = coefficients.mul_(factors) if fresh else coefficients * factors
    diffused: Tensor = torch.fft.irfftn(coefficients, s=x.shape[-3:], dim=_CIRCULANT)
    return diffused


def _op(
    x: Tensor,
    reaction: Tensor,
    weight: Tensor,
    step: Tensor,
    factors: Tensor | None,
    form: str,
    boundary: str,
    residual: bool,
) -> Tensor:
    dtype = result_dtype(x)
    with no_autocast(x):
        wide, r = widened(x), widened(reaction)
        h, kernel = step.to(wide.dtype), widened(weight).to(wide.dtype)
        if form != "explicit" or boundary == "periodic":
            size = _image_size(x, weight)
        if form == "implicit":
            factors = spectrum(kernel, step, size, form) if factors is None else factors
        elif form == "circulant" and factors is None and weight.shape[0] > DENSE_CHANNELS:
            factors = spectrum(kernel, step, size, form)
        factors = None if factors is None else factors.to(wide.dtype)

        in_place = worth_chunking(wide, r, kernel, h, factors, least=0)

        def advance(x: Tensor, r: Tensor) -> Tensor:
            if form == "implicit":
                return _solved(torch.addcmul(x, h, r) if residual else h * r, factors)
            circulant = form == "circulant"
            diffused = _circulant_squared(x, kernel, factors) if circulant else _squared(x, kernel, boundary)
            # h(KᵀK y − r), over the memory of the first where nothing is recorded
            change = diffused.sub_(r) if in_place else diffused - r
            return torch.addcmul(x, h, change, value=-1) if residual else -h * change

        if x.shape[0] > 1 and worth_chunking(wide, r, kernel, h, factors):
            y = by_image(advance, wide, r)
        else:
            y = advance(wide, r)
    result: Tensor = y.to(dtype)
    return result


def _solved(wanted: Tensor, factors: Tensor | None) -> Tensor:
    """The coefficients of the 2-D Fourier transform times ``factors``; a few channels at a time where that pays."""
    assert factors is not None
    size = (int(wanted.shape[-2]), int(wanted.shape[-1]))
    count = max(1, _CHUNK // (size[0] * size[1]))
    if count >= wanted.shape[1] or not worth_chunking(wanted, factors, least=_CHUNK):
        solved: Tensor = torch.fft.irfft2(torch.fft.rfft2(wanted) * factors, s=size)
        return solved
    out = torch.empty_like(wanted)
    for first in range(0, wanted.shape[1], count):
        some = slice(first, first + count)
        coefficients = torch.fft.rfft2(wanted[:, some]).mul_(factors[some])
        out[:, some] = torch.fft.irfft2(coefficients, s=size)
    return out


define_op(
    "reaction_diffusion2d(Tensor input, Tensor reaction, Tensor weight, Tensor step, Tensor? factors, str form, "
    "str boundary, bool residual) -> Tensor",
    _op,
)


def reaction_diffusion(
    input: Tensor,
    reaction: Tensor,
    weight: Tensor,
    step: float | Tensor = 0.1,
    *,
    form: str = "explicit",
    boundary: str = "periodic",
    residual: bool = True,
) -> Tensor:
    """One time step of a reaction-diffusion equation, for a reaction term that is given.

    *Low-Cost Parameterizations of Deep Convolutional Neural Networks*: with K the convolution by ``weight`` and r the
    reaction, ``y + h(r − KᵀK y)`` (explicit, eq. 9; circulant, with K of eq. 12) or ``(I + h KᵀK)⁻¹ (y + h r)``
    (implicit, eq. 11), solved exactly by FFT. Kᵀ is the exact adjoint under the same boundary. Half precision is
    computed in float32.

    Args:
        input: y, (N, C, H, W) or (C, H, W).
        reaction: r, of the same shape; in the paper relu(norm(M y)) with M a 1x1 convolution.
        weight: (C, 1, k, k), k odd: a kernel for each channel, or the circulant operator's stencils.
        step: h > 0.
        form: "explicit", "implicit" or "circulant".
        boundary: "periodic", or "zeros" for the explicit form.
        residual: without it, the step without y itself: ``h(r − KᵀK y)``, or ``(I + h KᵀK)⁻¹ h r``.

    Returns:
        Of the shape and dtype of ``input``.

    Raises:
        ValueError: for an unknown form or boundary, an even kernel, a step that is not above 0, shapes that do not fit.
        ModelError: for an image smaller than the kernel where the boundary is periodic.

    Example:
        >>> import torch, convsurgery.functional as CF
        >>> y, k = torch.randn(1, 4, 8, 8), torch.zeros(4, 1, 3, 3)
        >>> torch.equal(CF.reaction_diffusion(y, torch.zeros_like(y), k), y)  # nothing reacts, nothing diffuses
        True
    """
    check(form, boundary, (weight.shape[-2], weight.shape[-1]))
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] != input.shape[-3]:
        raise ValueError(f"weight must be ({input.shape[-3]}, 1, k, k), not {tuple(weight.shape)}")
    if reaction.shape != input.shape:
        raise ValueError(f"reaction has shape {tuple(reaction.shape)}, input {tuple(input.shape)}")
    if not isinstance(step, Tensor):
        if not step > 0:
            raise ValueError(f"step must be above 0, not {step}")
        step = torch.tensor(step, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    batched = input.dim() == 4
    r = reaction if batched else reaction.unsqueeze(0)
    y = input if batched else input.unsqueeze(0)
    out: Tensor = torch.ops.convsurgery.reaction_diffusion2d(y, r, weight, step, None, form, boundary, residual)
    return out if batched else out.squeeze(0)


def check(form: str, boundary: str, kernel: tuple[int, int]) -> None:
    """Raise ValueError for what cannot be combined."""
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if boundary not in ("periodic", "zeros"):
        raise ValueError(f"boundary must be periodic or zeros, not {boundary!r}")
    if boundary == "zeros" and form != "explicit":
        raise ValueError(f"the {form} form is solved by FFT and needs a periodic boundary")
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"the adjoint needs odd kernels, not {kernel[0]}x{kernel[1]}")
