"""Models every test file uses: hazards named after what makes them hard, and one trained on real digits."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import convsurgery as cs

# One thread: on a machine with other work, threads that wait for each other make small models many times slower. Also
# in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def needs(module: str, extra: str) -> None:
    """Skip a test where a module is missing that only an extra brings; the reason names the extra."""
    pytest.importorskip(module, reason=f"needs {module}: pip install 'convsurgery[{extra}]'")


def as_before(plan: cs.Plan) -> cs.Plan:
    """``plan`` as convsurgery 0.1 would have made it: neutral starts scale filters, and a BatchNorm takes the gain."""
    data = plan.to_dict()
    data["format"] = 1
    for entry in data["entries"]:
        del entry["scaled"]
        alone = entry["site"]["batchnorm"] is not None and not entry["site"]["geometry"]["bias"]
        entry["absorb"] = bool(alone and (entry["start"] or "").startswith("neutral"))
    return cs.Plan.from_dict(data)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class SharedNet(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = self.first
        self.blocks = nn.ModuleList([self.first, nn.Conv2d(3, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.second(self.first(x))).mean((2, 3))


class RepeatedNet(nn.Module):
    """One convolution called three times, each time before the same BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(self.conv(x))
        return x.mean((2, 3))


class ReversedNet(nn.Module):
    """Registered in the opposite order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(4, 5, 3)
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.stem(x))).mean((2, 3))


class UnusedNet(nn.Module):
    """A convolution that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).mean((2, 3))


class FunctionalWeightNet(nn.Module):
    """A convolution whose weight is also used outside its call, inside a module that FX does not enter."""

    class Inner(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            if float(x.shape[0]) > 0:
                return F.conv2d(self.conv(x), self.conv.weight.transpose(0, 1), padding=1)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.plain = self.Inner(nn.Conv2d(3, 4, 3, padding=1)), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.inner(x)).mean((2, 3))


class UntraceableNet(nn.Module):
    """Control flow on values' shapes that FX cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == x.sum() and x.shape[0] > 0:
            x = self.norm(self.conv(x))
        return x.mean((2, 3))


class ShapeFlowNet(nn.Module):
    """Control flow on shapes: FX fails, fake tensors do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = self.norm(self.conv(x))
        return x.mean((2, 3))


class OwnConv(nn.Conv2d):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SubclassNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.plain = OwnConv(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.own(x)).mean((2, 3))


class ParametrizedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.hooked = nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
        self.plain = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.hooked(self.normed(x))).mean((2, 3))


class ReflectNet(nn.Module):
    """Every padding there is."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("reflect", "circular", "replicate", "zeros")
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode) for mode in modes)
        self.same = nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        return self.same(x).mean((2, 3))


class MixedDtypeNet(nn.Module):
    """Half of it in bfloat16, one part frozen, one in another train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Conv2d(3, 4, 3)
        self.reduced = nn.Conv2d(4, 4, 3).to(torch.bfloat16)
        self.full.weight.requires_grad_(False)
        self.reduced.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.reduced(self.full(x).to(torch.bfloat16)).float().mean((2, 3))


class NestedGraphNet(nn.Module):
    """A GraphModule inside."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
        self.tail = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.graph(x)).mean((2, 3))


HAZARDS: dict[str, Callable[[], nn.Module]] = {
    "shared": SharedNet,
    "repeated": RepeatedNet,
    "reversed": ReversedNet,
    "unused": UnusedNet,
    "functional-weight": FunctionalWeightNet,
    "shape-flow": ShapeFlowNet,
    "subclass": SubclassNet,
    "parametrized": ParametrizedNet,
    "reflect": ReflectNet,
    "mixed-dtype": MixedDtypeNet,
    "nested-graph": NestedGraphNet,
    "root": lambda: nn.Conv2d(3, 4, 3, padding=1),
}


@pytest.fixture(params=HAZARDS)
def hazard(request: pytest.FixtureRequest) -> nn.Module:
    return HAZARDS[request.param]()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 12, 12)


@pytest.fixture(scope="session")
def digits() -> object:
    """scikit-learn's digits for a 32x32 one-channel model: loaders ``train`` and ``val``."""
    import convsurgery as cs
    from convsurgery.adapt.data import load_data

    model = cs.create_model("resnet10t", num_classes=10, in_chans=1, img_size=32, device="meta")
    return load_data("digits", model=model, batch_size=64)


@pytest.fixture(scope="session")
def digits_model(digits: object) -> nn.Module:
    """A timm ResNet trained on real digits; above 90 % on held-out ones."""
    import convsurgery as cs

    torch.manual_seed(0)
    model = cs.create_model("resnet10t", num_classes=10, in_chans=1, img_size=32)
    result = cs.finetune(model, digits, epochs=3, lr=3e-3, warmup_epochs=1, progress=False)
    assert result.last.val_top1 > 90
    return model.eval()
