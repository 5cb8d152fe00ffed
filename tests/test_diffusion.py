"""Reaction-diffusion steps against dense matrices in float64, LinearMix in whole models, and the reference networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from operator_table import STEPS as ROWS
from operator_table import StepRow
from test_mix_operators import fit
from test_operators import gradients
from torch import Tensor, nn

import convsurgery as cs
import convsurgery.functional as CF
from convsurgery.models.rdnet import STEPS, RDNet
from convsurgery.operators import OperatorLayer, bind
from convsurgery.operators.chunks import by_image
from convsurgery.operators.diffusion import ReactionDiffusion2d, op
from convsurgery.operators.linear_mix import LinearMix2d
from convsurgery.rules import parse_target

FORMS = tuple((row.form, row.boundary) for row in ROWS)
forms = pytest.mark.parametrize(("form", "boundary"), FORMS)
#: channels, height, width, kernel: more channels than are computed densely, odd and even sizes, one and two passes
SHAPES = ((3, 6, 5, 3), (2, 7, 8, 7), (20, 4, 5, 3), (17, 3, 3, 3))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def one_thread_and_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def draw(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, r, K and h in float64."""
    channels, height, width, kernel = shape
    y, r = torch.randn(2, 2, channels, height, width, dtype=torch.float64)
    return y, r, torch.randn(channels, 1, kernel, kernel, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def matrix(weight: Tensor, shape: tuple[int, int, int, int], form: str, boundary: str) -> np.ndarray:
    """K as a dense matrix, entry by entry from the definition of the operators."""
    channels, height, width, kernel = shape
    size, middle = channels * height * width, kernel // 2
    dense = np.zeros((size, size))

    def place(c: int, i: int, j: int) -> int:
        return (c * height + i) * width + j

    k = weight.squeeze(1).numpy()
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                for a in range(kernel):
                    for b in range(kernel):
                        row, column = i + a - middle, j + b - middle
                        if boundary == "zeros" and not (0 <= row < height and 0 <= column < width):
                            continue
                        sources = range(channels) if form == "circulant" else [c]
                        for s in sources:
                            stencil = k[(s - c) % channels] if form == "circulant" else k[c]
                            dense[place(c, i, j), place(s, row % height, column % width)] += stencil[a, b]
    return dense


def step_by_matrix(y: Tensor, r: Tensor, dense: np.ndarray, h: float, form: str, residual: bool) -> Tensor:
    rows, reaction = (t.flatten(1).numpy().T for t in (y, r))
    normal = dense.T @ dense
    if form == "implicit":
        wanted = rows + h * reaction if residual else h * reaction
        new = np.linalg.solve(np.eye(len(normal)) + h * normal, wanted)
    else:
        change = h * (reaction - normal @ rows)
        new = rows + change if residual else change
    return torch.from_numpy(new.T.copy()).view_as(y)


@forms
@shapes
@pytest.mark.parametrize("residual", [True, False])
def test_step_is_that_of_the_dense_matrices(shape: Any, form: str, boundary: str, residual: bool) -> None:
    y, r, weight, h = draw(shape)
    wanted = step_by_matrix(y, r, matrix(weight, shape, form, boundary), float(h), form, residual)
    got = CF.reaction_diffusion(y, r, weight, h, form=form, boundary=boundary, residual=residual)
    assert naive.error(got, wanted) <= 1e-13
    given = CF.reaction_diffusion(y, r, weight, 0.3, form=form, boundary=boundary, residual=residual)
    assert naive.error(given, wanted) <= 1e-7  # a number becomes float32 beside float64 weights no more than rounded
    with torch.no_grad():
        assert naive.error(
            CF.reaction_diffusion(y[0], r[0], weight, h, form=form, boundary=boundary, residual=residual), wanted[0]
        ) <= 1e-13  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("circulant", [False, True])
def test_adjoint_is_exact(shape: Any, circulant: bool) -> None:
    """⟨Ku, v⟩ = ⟨u, Kᵀv⟩."""
    u, v, weight, _ = draw(shape)
    kernel = op._circulant_kernel(weight) if circulant else weight
    groups = 1 if circulant else weight.shape[0]
    left = (op._circular(u, kernel, groups, False) * v).sum()
    right = (u * op._circular(v, kernel, groups, True)).sum()
    assert abs(float(left - right)) <= 1e-12 * float(left.abs() + right.abs())


@shapes
def test_one_pass_and_two_passes_are_the_same(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    y, _, weight, _ = draw(shape)
    if shape[3] * 2 - 1 > 2 * min(shape[1], shape[2]):
        pytest.skip("the doubled kernel would wrap around more than once")
    found = []
    for limit in (0, 99):
        monkeypatch.setattr(op, "_ONE_PASS", limit)
        found.append(op._squared(y, weight, "periodic"))
    assert naive.error(found[1], found[0]) <= 1e-14


@pytest.mark.parametrize("seed", range(5))
def test_implicit_operator_has_a_spectral_radius_below_1(seed: int) -> None:
    """(I + hKᵀK)⁻¹ for any θ; its eigenvalues are the spectrum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 1, 3, 3, generator=generator, dtype=torch.float64) * 10.0 ** (seed - 2)
    h = torch.tensor(10.0 ** (2 - seed), dtype=torch.float64)
    factors = op.spectrum(weight, h, (6, 5), "implicit")
    assert float(factors.max()) < 1
    assert float(factors.min()) > 0
    dense = matrix(weight, (6, 6, 5, 3), "implicit", "periodic")
    inverse = np.linalg.inv(np.eye(len(dense)) + float(h) * dense.T @ dense)
    assert np.abs(np.linalg.eigvalsh((inverse + inverse.T) / 2)).max() == pytest.approx(float(factors.max()), rel=1e-6)


@forms
def test_periodic_steps_commute_with_shifts(form: str, boundary: str) -> None:
    y, r, weight, h = draw((20, 6, 7, 3))
    step = lambda a, b: CF.reaction_diffusion(a, b, weight, h, form=form, boundary=boundary)  # noqa: E731
    moved = step(y.roll((2, 3), (2, 3)), r.roll((2, 3), (2, 3)))
    assert (naive.error(moved, step(y, r).roll((2, 3), (2, 3))) <= 1e-13) == (boundary == "periodic")
    if form == "circulant":
        assert naive.error(step(y.roll(5, 1), r.roll(5, 1)), step(y, r).roll(5, 1)) <= 1e-13


@forms
@pytest.mark.parametrize("channels", [2, 17])
def test_gradients(form: str, boundary: str, channels: int) -> None:
    y, r, weight, h = (t.requires_grad_() for t in draw((channels, 3, 4, 3)))
    function = lambda *args: CF.reaction_diffusion(*args, form=form, boundary=boundary)  # noqa: E731
    assert torch.autograd.gradcheck(function, (y[:1], r[:1], weight, h), fast_mode=channels > 2)
    if channels == 2:
        assert torch.autograd.gradgradcheck(function, (y[:1], r[:1], weight, h), fast_mode=True)


@forms
@pytest.mark.parametrize("channels", [3, 18])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(form: str, boundary: str, channels: int, grad: bool) -> None:
    y, r = torch.randn(2, 2, channels, 5, 4)
    weight, h = torch.randn(channels, 1, 3, 3), torch.tensor(0.1)
    if grad:
        for tensor in (y, weight, h):
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.convsurgery.reaction_diffusion2d.default, (y, r, weight, h, None, form, boundary, True)
    )


rows = pytest.mark.parametrize("row", ROWS, ids=str)


def layer_of(row: StepRow, **options: Any) -> ReactionDiffusion2d:
    return ReactionDiffusion2d(20, form=row.form, boundary=row.boundary, **options)


@rows
def test_compiled(row: StepRow) -> None:
    layer, x = layer_of(row), torch.randn(2, 20, 6, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for images in (x, torch.cat([x, x])):  # the second with a batch that was not seen before
        wanted, got = gradients(layer, layer, images), gradients(compiled, layer, images)
        assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float32 * 10
    layer.eval()
    assert naive.error(compiled(x), layer(x)) <= row.float32


@rows
def test_torch_export_keeps_the_operator_whole(row: StepRow) -> None:
    layer, x = layer_of(row).eval(), torch.randn(2, 20, 6, 5)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ours = [node for node in program.graph.nodes if getattr(node.target, "namespace", "") == "convsurgery"]
    assert [node.target for node in ours] == [torch.ops.convsurgery.reaction_diffusion2d.default]
    more = torch.cat([x, x[:1]])
    assert naive.error(program.module()(more), layer(more)) <= row.float32


@rows
def test_channels_last_gives_the_same_values(row: StepRow) -> None:
    layer, x = layer_of(row).double(), torch.randn(2, 20, 6, 5, dtype=torch.float64)
    wanted = gradients(layer, layer, x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    got = gradients(last, last, x.to(memory_format=torch.channels_last))
    assert max(naive.error(g, w) for g, w in zip(got, wanted, strict=True)) <= row.float64 * 10


@rows
def test_copies_share_nothing(row: StepRow) -> None:
    layer, x = layer_of(row, learnable=True).eval(), torch.randn(2, 20, 6, 5)
    twin, wanted = copy.deepcopy(layer), layer(x).detach().clone()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.fill_(1)
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(twin(x), wanted)


@rows
def test_config_and_rule_are_the_same(row: StepRow) -> None:
    config = row.config
    assert bind(parse_target(str(config))) == config
    assert bind(config.to_target()) == config
    assert config.start_for(None).name == "random"
    assert config.start_for(None, data=True).name == "fit"


@rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(row: StepRow, dtype: torch.dtype) -> None:
    layer, x = layer_of(row).eval(), torch.randn(2, 20, 6, 5)
    wanted = layer(x)
    with torch.autocast("cpu", dtype):
        got = layer(x)
    assert got.dtype == dtype
    bound = getattr(row, str(dtype).removeprefix("torch."))
    assert naive.error(got, wanted) <= bound
    half = copy.deepcopy(layer).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    assert naive.error(half(x.to(dtype)), wanted) <= 2 * bound
    got.float().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


@forms
def test_batches_in_parts_are_the_same(form: str, boundary: str) -> None:
    """Large batches go image by image in inference; with a tape they do not."""
    layer, x = ReactionDiffusion2d(64, form=form, boundary=boundary).eval(), torch.randn(9, 64, 64, 64)
    recorded = layer(x)
    with torch.no_grad():
        assert naive.error(layer(x), recorded) <= 1e-6
    mixed = LinearMix2d(64, 64, 3, padding=1)
    recorded = mixed(x)
    with torch.no_grad():
        assert naive.error(mixed(x), recorded) <= 1e-6
    assert torch.equal(by_image(torch.sin, x), x.sin())


# The layer.


def test_spectrum_is_kept_in_eval_mode_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any) -> Tensor:
        made.append(args[2])
        return op.spectrum(*args)

    monkeypatch.setattr("convsurgery.operators.diffusion.layer.spectrum", counted)
    layer, x = ReactionDiffusion2d(4, form="implicit", learnable=True).eval(), torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(made) == 1
        assert not torch.equal(layer(torch.randn(1, 4, 7, 6)), first)
        assert len(made) == 2
        layer.weight.mul_(2)
        changed = layer(torch.cat([x, x]))[:1]
        assert len(made) == 3
        assert not torch.allclose(changed, first)
        layer.log_step.add_(1)
        layer(x)
        assert len(made) == 4
        layer.double()(x.double())
        assert len(made) == 5
        layer.train()(x.double())
        assert len(made) == 5
    twin = copy.deepcopy(layer)
    assert twin._kept is None
    assert "factors" not in "".join(layer.state_dict())


def test_spectrum_that_is_not_finite_is_told() -> None:
    layer = ReactionDiffusion2d(2, form="implicit").eval()
    layer.weight.data.fill_(math.inf)
    with (
        torch.no_grad(),
        pytest.raises(cs.ConvSurgeryError, match=r"an implicit step over 2 channels is not finite"),
    ):
        layer(torch.randn(1, 2, 5, 5))


@forms
def test_layer_is_its_formula(form: str, boundary: str) -> None:
    layer = ReactionDiffusion2d(20, 3, form, boundary=boundary, act="silu", step=0.2).double().eval()
    layer.norm.running_mean.normal_()
    x = torch.randn(2, 20, 5, 6, dtype=torch.float64)
    reaction = F.silu(layer.norm(F.conv2d(x, layer.mix.weight)))
    h = layer.step.double()
    wanted = CF.reaction_diffusion(x, reaction, layer.weight, h, form=form, boundary=boundary)
    assert naive.error(layer(x), wanted) <= 1e-14
    assert naive.error(layer(x[0]), wanted[0]) <= 1e-14
    with torch.no_grad():
        assert naive.error(layer(x), wanted) <= 1e-14
    assert naive.error(layer.fold()(x), wanted) <= 1e-13
    padded = copy.deepcopy(layer)
    padded.pad = 2
    around = [F.pad(t, [2] * 4) for t in (x, reaction)]
    inner = CF.reaction_diffusion(*around, layer.weight, h, form=form, boundary=boundary)[..., 2:-2, 2:-2]
    assert naive.error(padded(x), inner) <= 1e-14


def test_learnable_step_stays_positive_and_is_learned() -> None:
    layer, x = ReactionDiffusion2d(3, form="explicit", learnable=True, step=0.5), torch.randn(4, 3, 6, 6)
    assert float(layer.time_step()) == pytest.approx(0.5)
    optimiser = torch.optim.SGD(layer.parameters(), lr=100.0)
    for _ in range(3):
        optimiser.zero_grad()
        layer(x).square().sum().backward()
        optimiser.step()
        assert float(layer.time_step()) > 0
    assert "learnable" in repr(layer)
    folded = layer.eval().fold()
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.0}, "step must be above 0, not 0.0"),
        ({"step": -1}, "step must be above 0, not -1"),
        ({"step": math.inf}, "step must be above 0"),
        ({"kernel_size": 4}, "the adjoint needs odd kernels, not 4x4"),
        ({"form": "implicit", "boundary": "zeros"}, "the implicit form is solved by FFT and needs a periodic boundary"),
        ({"form": "fast"}, "form must be one of explicit, implicit, circulant"),
        ({"boundary": "open"}, "boundary must be periodic or zeros"),
        ({"act": "rlu"}, "act must be one of"),
        ({"norm": "layer"}, "norm must be batch or none"),
        ({"pad": -1}, "pad must not be below 0"),
    ],
)
def test_layer_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReactionDiffusion2d(4, **options)


def test_image_smaller_than_the_kernel_is_refused() -> None:
    for form in ("explicit", "implicit", "circulant"):
        with pytest.raises(
            cs.ConvSurgeryError, match=r"a kernel of \(5, 5\) pixels does not fit into an image of \(4, 9\)"
        ):
            ReactionDiffusion2d(3, 5, form)(torch.randn(1, 3, 4, 9))
    y = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"weight must be \(3, 1, k, k\)"):
        CF.reaction_diffusion(y, y, torch.randn(4, 1, 3, 3))
    with pytest.raises(ValueError, match="reaction has shape"):
        CF.reaction_diffusion(y, y[:, :, :3], torch.randn(3, 1, 3, 3))
    with pytest.raises(ValueError, match="step must be above 0, not 0"):
        CF.reaction_diffusion(y, y, torch.randn(3, 1, 3, 3), 0)


# LinearMix in models.


def test_linear_mix_fit_is_the_best_of_its_sparsity() -> None:
    """Against numpy's least squares over the free values; and never worse than the projection."""
    for options in ({"padding": 1}, {"padding": 1, "groups": 2}, {"stride": 2, "bias": False}, {"out_channels": 6}):
        conv = nn.Conv2d(4, **{"out_channels": 4, "kernel_size": 3, **options}).double()
        x = torch.randn(8, 4, 9, 9).double()
        x = x + F.avg_pool2d(x, 3, 1, 1) + 0.5 * x.roll(1, 1)
        layer = LinearMix2d(
            4, conv.out_channels, 3, conv.stride, conv.padding, groups=conv.groups, bias=conv.bias is not None
        )
        layer.double().project(conv.weight.detach())
        if conv.bias is not None:
            layer.bias.data.copy_(conv.bias)
        before = (layer(x) - conv(x)).square().sum()
        error, _ = fit(layer, conv, x, ridge=1e-12)
        after = (layer(x) - conv(x)).detach().square().sum((0, 2, 3))
        assert after.sum() < before
        probe = copy.deepcopy(layer)
        for parameter in (probe.weight, probe.mix):
            parameter.data.fill_(1.0)
        free = probe.dense() != 0
        columns = F.unfold(x, 3, padding=conv.padding, stride=conv.stride).unflatten(1, (conv.groups, -1))
        y, best, variance = conv(x).detach(), [], []
        for o in range(conv.out_channels):
            group = o // (conv.out_channels // conv.groups)
            a = columns[:, group, free[o].flatten()].transpose(1, 2).flatten(0, 1).numpy()
            if conv.bias is not None:
                a = np.concatenate([a, np.ones((len(a), 1))], 1)
            t = y[:, o].flatten().numpy()
            solution, *_ = np.linalg.lstsq(a, t, rcond=None)
            best.append(float(((a @ solution - t) ** 2).sum()))
            variance.append(float(((t - t.mean()) ** 2).sum() if conv.bias is not None else (t**2).sum()))
        np.testing.assert_allclose(after.numpy(), best, rtol=1e-6)
        assert error == pytest.approx(float(np.mean(np.array(best) / np.array(variance))) ** 0.5, rel=1e-5)


def test_projection_is_orthogonal() -> None:
    """What is dropped is orthogonal to every LinearMix filter, and a LinearMix filter is its own projection."""
    conv, layer = nn.Conv2d(5, 5, 3, bias=False), LinearMix2d(5, 5, 3, bias=False)
    layer.project(conv.weight.detach())
    dropped = conv.weight - layer.dense()
    other = LinearMix2d(5, 5, 3, bias=False).dense()
    assert abs(float((dropped * other).sum())) < 1e-5
    again = LinearMix2d(5, 5, 3, bias=False)
    again.project(other.detach())
    torch.testing.assert_close(again.dense(), other, rtol=0, atol=1e-6)


def test_pointwise_convolutions_are_kept() -> None:
    conv, x = nn.Conv2d(6, 6, 1), torch.randn(2, 6, 5, 5)
    layer = LinearMix2d(6, 6, 1)
    layer.project(conv.weight.detach())
    layer.bias = conv.bias
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-6, atol=1e-6)


def test_linear_mix_in_a_resnet(tmp_path: Path) -> None:
    model, x = timm.create_model("resnet18", num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    made = cs.plan(model, "conv[k=3, s=1, cin=cout]->linear-mix", example_inputs=x)
    assert len(made.edits) == 13
    assert not made.skips
    everywhere = cs.plan(model, "all-conv->linear-mix", example_inputs=x)
    reasons = {str(entry.reason) for entry in everywhere.skips}
    assert "64 to 128 channels: as many outputs as inputs and no groups, unless extend=true" in reasons
    assert len(cs.plan(model, "all-conv->linear-mix(extend=true)", example_inputs=x).edits) == 20
    new = cs.convert(model, "conv[k=3, s=1, cin=cout]->linear-mix", example_inputs=x, calibration=x)
    planned = made.total_params + made.after.params - made.before.params
    assert sum(p.numel() for p in new.parameters()) == planned
    cs.save(new, tmp_path / "saved")
    wanted = new(x)
    assert torch.equal(cs.load(tmp_path / "saved")(x), wanted)
    assert cs.export_onnx(new, tmp_path / "model.onnx", example_inputs=x) is not None
    # timm finds fuse() by its name and makes dense convolutions of them again
    dense = timm.utils.reparameterize_model(new)
    assert not any(isinstance(m, LinearMix2d) for m in dense.modules())
    torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-4)


def test_linear_mix_in_place_of_padded_and_standardised_convolutions() -> None:
    for name, rule in (("tf_efficientnet_b0", "depthwise[s=2]"), ("resnetv2_50x1_bit", "conv[k=3, cin=cout]")):
        model, x = cs.create_model(name, num_classes=4, img_size=64), torch.randn(2, 3, 64, 64)
        new = cs.convert(model, f"{rule}->linear-mix(extend=true)", example_inputs=x, calibration=x)
        replaced = [m for m in new.modules() if isinstance(m, LinearMix2d)]
        assert replaced
        assert new(x).shape == model(x).shape
        if "efficientnet" in name:  # a depthwise convolution is one
            torch.testing.assert_close(new(x), model(x), rtol=1e-3, atol=1e-4)


# The reference networks.

TABLE_2 = {
    "resnet": (1_555_274, 3_494_122, 3_528_772, 6_324_900),
    "linear-mix": (195_146, 421_738, 456_388, 788_900),
    **dict.fromkeys(("mobilenet", "explicit", "implicit", "circulant"), (101_066, 216_106, 250_756, 423_460)),
}


@pytest.mark.parametrize("step", STEPS)
def test_parameter_counts_of_table_2(step: str) -> None:
    """To the digit, normalisation left out, as the paper counts."""
    for count, (size, classes) in zip(TABLE_2[step], (("a", 10), ("b", 10), ("b", 100), ("c", 100)), strict=True):
        model = timm.create_model(f"rdnet_{size}", step=step, num_classes=classes)
        norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
        assert sum(p.numel() for p in model.parameters()) - norms == count


@pytest.mark.parametrize("step", STEPS)
def test_reference_network_is_a_model_of_timms(step: str, tmp_path: Path) -> None:
    model = cs.create_model("rdnet_a", step=step, num_classes=7, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    assert isinstance(model, RDNet)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
    assert model(torch.randn(1, 1, 40, 36)).shape == (1, 7)
    cs.save(model, tmp_path / "saved")
    assert torch.equal(cs.load(tmp_path / "saved")(x), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    features = timm.create_model("rdnet_a", step=step, features_only=True)
    maps = features(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == [32, 64, 128, 256]
    assert [32 // m.shape[2] for m in maps] == features.feature_info.reduction()
    assert any(isinstance(m, OperatorLayer) for m in model.modules()) == (step not in ("resnet", "mobilenet"))


def test_reference_network_refuses() -> None:
    with pytest.raises(ValueError, match="step must be one of resnet, mobilenet, linear-mix"):
        timm.create_model("rdnet_a", step="euler")
    with pytest.raises(ValueError, match="every width must be twice the one before"):
        RDNet((32, 48))


def test_reference_network_learns() -> None:
    """Each kind of step, on digits: the loss falls from 2.3 below 2 in one epoch."""
    for step in STEPS:
        torch.manual_seed(0)
        model = cs.create_model("rdnet_a", step=step, in_chans=1, num_classes=10, img_size=16)
        result = cs.finetune(model, "digits", epochs=1, lr=1e-2, batch_size=64, warmup_epochs=0, progress=False)
        assert result.last.train_loss < 2, step
