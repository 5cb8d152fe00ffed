"""``fuse``: gains that operators are left with go into the weights of the convolution behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.operators.kervolution import Kervolution2d


def chain(*between: nn.Module, groups: int = 1, bias: bool = True, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
    behind = nn.Conv2d(8, 4, 3, padding=1, groups=groups)
    model = nn.Sequential(first, *([nn.BatchNorm2d(8)] if norm else []), *between, behind).double().eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 2)
    return model


def fused(model: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    new = cs.convert(model, "first-conv->kerv-poly by neutral(0.25)", example_inputs=x)
    layer = next(m for m in new.modules() if isinstance(m, Kervolution2d))
    layer.gain = layer.constant(torch.linspace(0.5, 2, 8))
    return new, cs.fuse(new), x


def error(deployed: nn.Module, new: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((deployed(x) - new(x)).abs().max() / new(x).abs().max())


THROUGH: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "nothing": tuple,
    "relu": lambda: (nn.ReLU(),),
    "leaky": lambda: (nn.LeakyReLU(0.3, inplace=True),),
    "pools": lambda: (nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
    "dropout": lambda: (nn.Dropout(0.5), nn.Identity()),
}


@pytest.mark.parametrize("between", THROUGH)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gain_goes_on(between: str, groups: int) -> None:
    new, deployed, x = fused(chain(*THROUGH[between](), groups=groups))
    layer = deployed[0]
    assert isinstance(layer, Kervolution2d)
    assert new[0].gain is not None
    assert layer.gain is None
    assert not torch.equal(deployed[-1].weight, new[-1].weight)
    assert error(deployed, new, x) < 1e-13


def test_behind_a_batchnorm_too() -> None:
    new, deployed, x = fused(chain(nn.ReLU(), bias=False, norm=True))
    assert deployed[0].gain is None
    assert type(deployed[1]) is nn.Identity
    assert error(deployed, new, x) < 1e-13


@pytest.mark.parametrize(
    "between", [(nn.ReLU6(),), (nn.GELU(),), (nn.Sigmoid(),), (nn.BatchNorm2d(8), nn.GELU())], ids=str
)
def test_what_is_not_scaled_alike_stops_it(between: tuple[nn.Module, ...]) -> None:
    new, deployed, x = fused(chain(*between))
    assert deployed[0].gain is not None
    assert torch.equal(deployed[-1].weight, new[-1].weight)
    assert error(deployed, new, x) < 1e-13


def test_negative_gains_stay() -> None:
    model = chain(nn.ReLU())
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    new = cs.convert(model, "first-conv->kerv-poly", example_inputs=x)
    new[0].gain = torch.linspace(-1, 1, 8, dtype=torch.float64).sub(0.1)
    deployed = cs.fuse(new)
    assert deployed[0].gain is not None
    assert error(deployed, new, x) < 1e-13


class Twice(nn.Module):
    """The output goes to two places, or the convolution behind is called twice."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(self.b(y)) if self.shared else self.b(y) + y


@pytest.mark.parametrize("shared", [True, False])
def test_other_consumers_stop_it(shared: bool) -> None:
    new, deployed, x = fused(Twice(shared).double().eval())
    assert deployed.a.gain is not None
    assert torch.equal(deployed.b.weight, new.b.weight)
    assert error(deployed, new, x) < 1e-13


@pytest.mark.parametrize("calibrated", [False, True])
def test_saved_and_loaded(tmp_path: Path, calibrated: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 12, 12)
    new = cs.convert(base, "first-conv->kerv-poly", example_inputs=x, calibration=x if calibrated else None)
    deployed = cs.fuse(new)
    cs.save(deployed, tmp_path / "out")
    again = cs.load(tmp_path / "out", base=base)
    assert torch.equal(again(x), deployed(x))
    assert (deployed[0].bias is not None) == calibrated


def test_original_is_untouched() -> None:
    model = chain(nn.ReLU())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    new, _, _ = fused(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(new[-1].weight, model[-1].weight)
