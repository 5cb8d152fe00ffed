"""What was put in is what runs: wherever a model holds its convolutions, and whoever else computes one."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import threading
import types
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import ConversionError, ModelError, NoMatchError
from convsurgery.graph import holders, observe
from convsurgery.surgery import apply_

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
M = TypeVar("M", bound=nn.Module)
RULE = "all-conv->kerv-gauss by copy"


def seeded(kind: Callable[[], M]) -> M:
    torch.manual_seed(0)
    return kind()


class Pair(nn.Module):
    """Two convolutions; a subclass says how it holds and calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)
        self.hold()

    def hold(self) -> None: ...

    def first(self) -> Any:
        return self.a

    def second(self) -> Any:
        return self.b

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second()(F.relu(self.first()(x)))
        return out


class InDict(Pair):
    def hold(self) -> None:
        self.held = {"a": self.a, "b": self.b}

    def first(self) -> Any:
        return self.held["a"]

    def second(self) -> Any:
        return self.held["b"]


class InList(Pair):
    def hold(self) -> None:
        self.held = [self.a, self.b]

    def first(self) -> Any:
        return self.held[0]

    def second(self) -> Any:
        return self.held[1]


class InTuple(InList):
    def hold(self) -> None:
        self.held = (self.a, self.b)  # type: ignore[assignment]


class InDeque(InList):
    def hold(self) -> None:
        self.held = collections.deque([self.a, self.b])  # type: ignore[assignment]


Two = collections.namedtuple("Two", "a b")


class InNested(InList):
    def hold(self) -> None:
        self.deep = {"x": [Two(self.a, (self.b,))]}

    def first(self) -> Any:
        return self.deep["x"][0].a

    def second(self) -> Any:
        return self.deep["x"][0].b[0]


class ByAttribute(Pair):
    def hold(self) -> None:
        object.__setattr__(self, "hidden", self.a)

    def first(self) -> Any:
        return self.hidden


class InNamespace(Pair):
    def hold(self) -> None:
        self.space = types.SimpleNamespace(a=self.a)

    def first(self) -> Any:
        return self.space.a


@dataclasses.dataclass(frozen=True, eq=False)
class Holder:
    conv: nn.Module


class InDataclass(Pair):
    def hold(self) -> None:
        self.holder = Holder(self.a)

    def first(self) -> Any:
        return self.holder.conv


class InUnregistered(Pair):
    def hold(self) -> None:
        self.wrapped = [nn.Sequential(self.a)]

    def first(self) -> Any:
        return self.wrapped[0]


class InSet(Pair):
    def hold(self) -> None:
        self.only = {self.a}

    def first(self) -> Any:
        return next(iter(self.only))


class InChild(Pair):
    def hold(self) -> None:
        self.child = nn.Identity()
        self.child.held = [self.a]  # type: ignore[assignment]

    def first(self) -> Any:
        return self.child.held[0]  # type: ignore[index]


class ByForward(Pair):
    """Hooks do not see such a call."""

    def first(self) -> Any:
        return self.a.forward


FOLLOWED = [
    InDict,
    InList,
    InTuple,
    InDeque,
    InNested,
    ByAttribute,
    InNamespace,
    InDataclass,
    InUnregistered,
    InSet,
    InChild,
    ByForward,
]


def expected(model: Pair) -> Tensor:
    """The operators on the model's own weights, put in by hand."""
    plain = Pair()
    plain.load_state_dict(model.state_dict())
    new = cs.convert(plain.eval(), RULE, example_inputs=X)
    out: Tensor = new(X)
    return out


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_else_holds_a_convolution_is_followed(kind: type[Pair]) -> None:
    model = seeded(kind).eval()
    before = model(X)
    plan = cs.plan(model, RULE, example_inputs=X)
    assert len(plan.edits) == 2
    assert plan.executed == 2
    new = cs.convert(model, RULE, example_inputs=X)
    assert torch.equal(new(X), expected(model))
    assert not torch.allclose(new(X), before)
    assert torch.equal(model(X), before)  # the original is as it was
    assert not any(isinstance(module, nn.Conv2d) for module in new.modules())
    assert torch.equal(cs.convert(model, "all-conv->conv", example_inputs=X)(X), before)
    assert torch.equal(cs.convert_(model, RULE, example_inputs=X)(X), new(X))


class Closure(Pair):
    def hold(self) -> None:
        conv = self.a
        self.call = lambda x: conv(x)

    def first(self) -> Any:
        return self.call


class BoundMethod(Pair):
    def hold(self) -> None:
        self.call = self.a.forward

    def first(self) -> Any:
        return self.call


class Partial(Pair):
    def hold(self) -> None:
        self.call = functools.partial(self.a)

    def first(self) -> Any:
        return self.call


class Frozen(Pair):
    def hold(self) -> None:
        self.only = frozenset([self.a])

    def first(self) -> Any:
        return next(iter(self.only))


class HeldForTraining(Pair):
    """No forward in eval mode would show it."""

    def hold(self) -> None:
        self.call = self.a.forward

    def first(self) -> Any:
        return self.call if self.training else self.a


ELSEWHERE: dict[int, nn.Module] = {}


class Global(Pair):
    def hold(self) -> None:
        self.key = id(self)
        ELSEWHERE[self.key] = self.a

    def first(self) -> Any:
        return ELSEWHERE[self.key]


REFUSED = {
    Closure: r"held by call \(a function that closes over it\)",
    BoundMethod: r"held by call \(its bound method forward\)",
    Partial: r"held by call \(a partial function\)",
    Frozen: r"held by only \(a frozen set\)",
    HeldForTraining: r"held by call \(its bound method forward\)",
    Global: "also called from somewhere else",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_followed_is_refused_with_its_holder(kind: type[Pair]) -> None:
    model = seeded(kind).eval()
    before = model(X)
    plan = cs.plan(model, RULE, example_inputs=X)
    assert [entry.site.name for entry in plan.edits] == ["b"]
    (skip,) = plan.skips
    assert skip.site.name == "a"
    assert re.search(REFUSED[kind], str(skip.reason)), skip.reason
    assert plan.executed == 2
    with pytest.raises(ConversionError, match=REFUSED[kind]):
        cs.plan(model, "conv[name=a]->kerv-gauss by copy", example_inputs=X)
    assert torch.equal(cs.convert(model, "all-conv->conv", example_inputs=X)(X), before)


class AsksForClass(Pair):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            if isinstance(layer, nn.Conv2d) or layer is self.b:
                x = layer(x if x.shape[1] == layer.in_channels else x.repeat(1, 2, 1, 1))
        return x


class UsesMethod(Pair):
    def first(self) -> Any:
        return lambda x: self.a._conv_forward(x, self.a.weight, self.a.bias)


class UsesPadding(Pair):
    """An attribute that instances of Conv2d have and layers need not."""

    def first(self) -> Any:
        self.a.reset_parameters  # noqa: B018
        return self.a


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (AsksForClass, "passes it over when it is no Conv2d"),
        (UsesMethod, "uses its _conv_forward, which only a Conv2d has"),
        (UsesPadding, "uses its reset_parameters, which only a Conv2d has"),
    ],
)
def test_forwards_that_notice_the_exchange(kind: type[Pair], reason: str) -> None:
    model = seeded(kind).eval()
    before = model(X)
    plan = cs.plan(model, RULE, example_inputs=X)
    assert {entry.site.name: entry.reason for entry in plan.skips} == {"a": plan.skips[0].reason}
    assert reason in str(plan.skips[0].reason)
    assert torch.equal(cs.convert(model, "all-conv->conv", example_inputs=X)(X), before)


def test_an_edit_that_would_not_run_is_undone() -> None:
    """The plan was made for a model whose twin calls something else."""

    class Other(Pair):
        def first(self) -> Any:
            return self.a if type(self.a) is nn.Conv2d else nn.Conv2d(3, 6, 3)

    model = seeded(Pair).eval()
    plan = cs.plan(model, RULE, example_inputs=X)
    other = seeded(Other).eval()
    state = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ConversionError, match="a: the model calls the new layer never, and what it replaced once"):
        apply_(other, plan)
    assert type(other.a) is nn.Conv2d
    assert cs.record(other) is None
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


def test_a_model_that_stops_running_is_undone() -> None:
    class Picky(Pair):
        def first(self) -> Any:
            assert type(self.a) is nn.Conv2d
            return self.a

    model = seeded(Pair).eval()
    plan = cs.plan(model, RULE, example_inputs=X)
    picky = seeded(Picky).eval()
    with pytest.raises(ConversionError, match="does not run after the edit"):
        apply_(picky, plan, example_inputs=(X,))
    with pytest.warns(UserWarning, match="could not be checked"):
        cs.apply(picky, plan)


class Mixed(nn.Module):
    """One convolution of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.up, self.line, self.solid = nn.ConvTranspose2d(4, 4, 2), nn.Conv1d(4, 4, 3), nn.Conv3d(1, 1, 1)
        self.loose = [nn.Conv2d(4, 4, 1)]
        self.kernel = nn.Parameter(torch.ones(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.up(self.conv(x)), self.kernel)
        x = self.solid(self.loose[0](x).unsqueeze(1)).squeeze(1)
        with torch.inference_mode():
            x = x + F.conv2d(x, torch.ones(4, 4, 1, 1))
        out: Tensor = self.line(x.flatten(2))
        return out


def test_every_executed_convolution_is_listed_or_explained() -> None:
    plan = cs.plan(Mixed().eval(), "all-conv->kerv-gauss by copy", example_inputs=X)
    found = {(other.kind, other.owner): (other.names, other.calls) for other in plan.others}
    assert found == {
        ("transposed 2-d", "ConvTranspose2d"): (("up",), 1),
        ("functional", "Mixed"): (("",), 2),
        ("unregistered", "Conv2d"): ((), 1),
        ("3-d", "Conv3d"): (("solid",), 1),
        ("1-d", "Conv1d"): (("line",), 1),
    }
    assert plan.executed == 7
    text = str(plan)
    assert "1 of 1 convolutions are replaced, 6 more are no Conv2d" in " ".join(text.split())
    assert "2 convolutions in Mixed (the model itself) are functional, not Conv2d" in text
    assert cs.Plan.from_json(plan.to_json()) == plan


def test_conditional_convolutions_of_timm_are_explained() -> None:
    plan = cs.plan("efficientnet_cc_b0_4e", "all-conv->conv")
    (other,) = plan.others
    assert (other.kind, other.owner, other.calls, plan.executed) == ("functional", "CondConv2d", 24, 81)
    assert other.names[0] == "blocks.4.0.conv_pw"


def test_no_conv2d_names_what_there_is_instead() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 4, 3))
    with pytest.raises(NoMatchError, match=r"no Conv2d[\s\S]*1 convolution in Conv1d \(0\) is 1-d") as caught:
        cs.plan(model, "all-conv->conv", example_inputs=torch.randn(1, 3, 9))
    assert "ConvTranspose1d (1) is transposed 1-d" in str(caught.value)


def test_a_subclass_that_convolves_twice_is_counted() -> None:
    class Twice(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + super().forward(x)

    plan = cs.plan(nn.Sequential(Twice(3, 4, 1), nn.Conv2d(4, 4, 1)).eval(), "all-conv->conv", example_inputs=X)
    assert [(o.kind, o.names, o.calls) for o in plan.others] == [("inside", ("0",), 1)]
    assert plan.executed == 3


def _shout(conv: nn.Module, x: Tensor) -> Tensor:
    return -nn.Conv2d.forward(conv, x)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["forward", "_conv_forward", "extra_repr", "_save_to_state_dict"])
def test_a_method_replaced_on_the_instance_is_a_reasoned_skip(name: str) -> None:
    model = seeded(Pair).eval()
    own = types.MethodType(_shout, model.a) if name == "forward" else getattr(model.a, name)
    setattr(model.a, name, own if name == "forward" else functools.partial(own))
    before = model(X)
    plan = cs.plan(model, "all-conv->conv", example_inputs=X)
    (skip,) = plan.skips
    assert f"its {name} was replaced on this instance" in str(skip.reason) or "held by a." in str(skip.reason)
    assert torch.equal(cs.convert(model, "all-conv->conv", example_inputs=X)(X), before)


@pytest.mark.parametrize(
    "register", ["register_state_dict_pre_hook", "register_load_state_dict_post_hook", "_register_state_dict_hook"]
)
def test_state_hooks_are_a_reasoned_skip(register: str) -> None:
    model = seeded(Pair).eval()
    getattr(model.a, register)(lambda *args: None)
    (skip,) = cs.plan(model, "all-conv->conv", example_inputs=X).skips
    assert "hooks" in str(skip.reason)


@pytest.mark.parametrize(
    "rule", ["all-conv->conv", RULE, "all-conv->kerv-poly", "all-conv->pnn", "all-conv->kerv-poly by blend"]
)
def test_what_hangs_on_an_instance_is_carried_over(rule: str) -> None:
    model = seeded(Pair).eval()
    model.a.f, model.a.route = -1, {"to": 3}  # type: ignore[assignment]
    model.a.register_buffer("seen", torch.ones(2))
    model.a.register_parameter("tempo", nn.Parameter(torch.ones(1)))
    model.a.extra = nn.ReLU()
    new = cs.convert(model, rule, example_inputs=X)
    assert (new.a.f, new.a.route) == (-1, {"to": 3})
    assert torch.equal(new.a.seen, torch.ones(2))
    assert isinstance(new.a.extra, nn.ReLU)
    prefix = "a." if "blend" not in rule else "a.original."
    assert {f"{prefix}seen", f"{prefix}tempo"} <= set(new.state_dict())
    new(X)


def test_an_attribute_that_the_new_layer_has_too_is_refused() -> None:
    model = seeded(Pair).eval()
    model.a.balance = 3  # type: ignore[assignment]
    with pytest.raises(ConversionError, match="a carries an attribute 'balance'"):
        cs.convert(model, "all-conv->kerv-poly", example_inputs=X)
    assert type(model.a) is nn.Conv2d


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)) + x)
        return out


def test_a_rewritten_owner_is_followed_into_lists() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.order = [self.blocks[1], self.blocks[0]]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.order:
                x = block(x)
            return x

    model = seeded(Net).eval()
    new = cs.convert(model, "conv-bn->block", example_inputs=X)
    assert len(cs.record(new).edits) == 2  # type: ignore[union-attr]
    assert all(block is held for block, held in zip(new.blocks, reversed(new.order), strict=True))
    assert torch.equal(new(X), model(X))


def test_a_forward_replaced_on_the_owner_is_no_pattern() -> None:
    model = nn.Sequential(seeded(Block), nn.Conv2d(3, 3, 1)).eval()
    model[0].forward = types.MethodType(lambda self, x: self.bn(self.conv(x)) * 2, model[0])  # type: ignore[assignment]
    before = model(X)
    with pytest.raises(NoMatchError):
        cs.plan(model, "residual->block", example_inputs=X)
    assert torch.equal(cs.convert(model, "all-conv->conv", example_inputs=X)(X), before)


def test_a_copy_that_is_the_original_is_refused() -> None:
    class Single(Pair):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    model = seeded(Single).eval()
    with pytest.raises(ConversionError, match="Single gives itself for its copy"):
        cs.convert(model, RULE, example_inputs=X)
    assert type(model.a) is nn.Conv2d


def test_holders_end_on_what_is_large_or_round() -> None:
    model = seeded(Pair)
    loop: list[Any] = []
    loop.append(loop)
    model.loop, model.large = loop, [[0] * 1000 for _ in range(1000)]  # type: ignore[assignment]
    deep: Any = model.a
    for _ in range(200):
        deep = [deep]
    model.deep = deep
    assert holders(model) == {}
    assert observe(model.eval(), (X,)).sites[0].blocked is None


@pytest.mark.parametrize("rule", ["all-conv->pnn", "all-conv->lbc", "all-conv->linear-mix(extend=true) by project"])
def test_an_optimiser_made_before_is_told(rule: str) -> None:
    model = seeded(Pair)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="an optimiser made before the conversion"):
        cs.convert_(model, rule, example_inputs=X)
    assert optimiser.param_groups


@pytest.mark.parametrize("rule", ["all-conv->conv", "all-conv->kerv-linear", "all-conv->kerv-gauss by copy"])
def test_an_optimiser_made_before_goes_on(rule: str, recwarn: pytest.WarningsRecorder) -> None:
    model = seeded(Pair)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    cs.convert_(model, rule, example_inputs=X)
    assert not recwarn.list
    before = model.a.weight.detach().clone()
    model(X).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model.a.weight, before)


def test_no_optimiser_no_word(recwarn: pytest.WarningsRecorder) -> None:
    cs.convert_(seeded(Pair), "all-conv->pnn", example_inputs=X)
    assert not recwarn.list


def _numbers() -> Any:
    yield 1


CARRIED = {
    "lock": threading.Lock,
    "rlock": threading.RLock,
    "event": threading.Event,
    "generator": torch.Generator,
    "inside": lambda: {"of": [threading.Lock()]},
}


@pytest.mark.parametrize("what", CARRIED)
def test_a_model_that_carries_a_lock_is_converted(what: str) -> None:
    model = seeded(InDict).eval()
    model.carried = CARRIED[what]()  # type: ignore[operator]
    assert len(cs.plan(model, RULE, example_inputs=X).edits) == 2
    new = cs.convert(model, RULE, example_inputs=X)
    assert new.carried is not model.carried
    assert torch.equal(new(X), cs.convert_(model, RULE, example_inputs=X)(X))


def test_the_copy_of_a_held_lock_is_free() -> None:
    model = seeded(Pair).eval()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with model.lock:  # type: ignore[attr-defined]
        new = cs.convert(model, RULE, example_inputs=X)
    assert new.lock.acquire(blocking=False)


@pytest.mark.parametrize("what", ["file", "numbers"])
def test_what_cannot_be_copied_is_named(what: str) -> None:
    model = seeded(Pair).eval()
    with open(__file__) as file:
        model.carried = [file if what == "file" else _numbers()]  # type: ignore[assignment]
        assert len(cs.plan(model, RULE, example_inputs=X).edits) == 2
        with pytest.raises(ModelError, match=r"carried\[0\] is a .*convert in place with convert_"):
            cs.convert(model, RULE, example_inputs=X)
        held = model.carried  # type: ignore[attr-defined]
        assert cs.convert_(model, RULE, example_inputs=X).carried is held
