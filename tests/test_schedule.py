"""Fine-tuning of models that change on the way: blends go to their operators, ε rises, outputs are watched."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import CPU, Tiny, launch, rows, same, tiny, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import convsurgery as cs
from convsurgery.adapt import EpochMetrics, finetune, finetuning
from convsurgery.adapt.trainer import Trainer
from convsurgery.errors import SettingsError, TrainingError
from convsurgery.operators import Blend
from convsurgery.operators.kervolution import PolyKervolution2d

#: batches of an epoch: powers of two, so that every t of a straight line is a number of float32
STEPS = 8
BLEND = "all-conv->kerv-poly(degree=2) by blend"


def data(steps: int = STEPS, size: int = 8) -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(steps * size, 1, 16, 16, generator=generator)
    labels = torch.randint(10, (steps * size,), generator=generator)
    held_out = TensorDataset(images[:16] + 0.1, labels[:16])
    return DataLoader(TensorDataset(images, labels), size, shuffle=True), DataLoader(held_out, 16)


def converted(rule: str = BLEND, model: nn.Module | None = None) -> Any:
    return cs.convert(tiny() if model is None else model, rule, example_inputs=torch.randn(2, 1, 16, 16))


def watch(model: nn.Module, name: str, value: Callable[[Any], float]) -> list[float]:
    """What ``value`` says of a module at each of its training steps."""
    seen: list[float] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            seen.append(value(module))

    model.get_submodule(name).register_forward_hook(look)
    return seen


def ts(model: nn.Module, name: str) -> list[float]:
    return watch(model, name, lambda module: float(module.t))


def float32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers of this test's runs."""
    made: list[Trainer] = []

    class Kept(Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(finetuning, "Trainer", Kept)
    return made


# --- the way of t

COSINE = [(1 - math.cos(math.pi * k / STEPS)) / 2 for k in range(1, STEPS + 1)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"epochs": 2, "blend_epochs": 1}, [k / 8 for k in range(1, 9)]),
        ({"epochs": 4}, [k / 16 for k in range(1, 17)]),
        ({"epochs": 2, "blend_epochs": 0.5}, [k / 4 for k in range(1, 5)] + [1.0] * 4),
        ({"epochs": 1, "blend_epochs": 1, "warmup_epochs": 0}, [k / 8 for k in range(1, 9)]),
        ({"epochs": 2, "blend_epochs": 1, "blend": "cosine"}, COSINE),
    ],
    ids=["linear", "half-of-all", "within-an-epoch", "to-the-end", "cosine"],
)
def test_t_goes_with_every_step(settings: dict[str, Any], wanted: list[float]) -> None:
    model = converted()
    both = ts(model, "conv1"), ts(model, "conv2")
    finetune(model, data(), **settings, **CPU)
    wanted = float32(wanted)
    assert wanted[-1] == 1
    assert both == (wanted, wanted)
    assert cs.blends(model) == {}
    assert type(model.conv1) is type(model.conv2) is PolyKervolution2d


@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_layers_go_one_after_the_other_in_execution_order(blend: str) -> None:
    model = tiny()
    # Registered in the opposite order.
    for name in reversed(list(model._modules)):
        model._modules[name] = model._modules.pop(name)
    assert next(iter(model._modules)) == "fc"
    model = converted(model=model)
    first, second = ts(model, "conv1"), ts(model, "conv2")
    finetune(model, data(), epochs=3, blend=blend, blend_epochs=2, blend_order="layers", **CPU)
    way = float32(COSINE if blend == "cosine" else [k / 8 for k in range(1, 9)])
    assert first == way  # and gone after the first epoch
    assert second == [0.0] * 8 + way
    assert cs.blends(model) == {}


def test_t_stays_where_it_is_when_asked() -> None:
    model = converted("all-conv->kerv-poly(degree=2) by blend(0.25)")
    seen = ts(model, "conv1")
    finetune(model, data(), epochs=2, blend="none", **CPU)
    assert seen == [0.25] * 16
    assert cs.blends(model) == {"conv1": 0.25, "conv2": 0.25}


def test_a_blend_that_begins_further_on_is_not_taken_back() -> None:
    model = converted()
    cs.set_blend(model, {"conv2": 0.5})
    both = ts(model, "conv1"), ts(model, "conv2")
    finetune(model, data(), epochs=2, blend_epochs=1, **CPU)
    assert both[0] == [k / 8 for k in range(1, 9)]
    assert both[1] == [0.5] * 4 + [k / 8 for k in range(5, 9)]


def test_loader_without_a_length_goes_epoch_by_epoch() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from data()[0].dataset

    model = converted()
    seen = ts(model, "conv1")
    finetune(model, (DataLoader(Stream(), 8), data()[1]), epochs=2, blend_epochs=2, sched="none", **CPU)
    assert seen == [0.5] * 8 + [1.0] * 8
    assert cs.blends(model) == {}


def test_mixed_precision() -> None:
    model = converted()
    seen = ts(model, "conv1")
    finetune(model, data(), epochs=2, blend_epochs=1, amp=True, **CPU)
    assert seen == [k / 8 for k in range(1, 9)]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# --- convolutions leave


class Aside(Tiny):
    """Its ``conv1`` is trained and run, and changes nothing: the rest must not notice what becomes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = self.conv1
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.aside.weight.data.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * self.aside(x).sum()


def rest(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if not name.startswith("aside.")}


def test_nothing_of_a_convolution_is_kept(trainers: list[Trainer]) -> None:
    model = converted("first-conv->kerv-poly(degree=2) by blend; last-conv->kerv-gauss(learnable) by blend")
    kept = {name.replace(".new", "") for name, _ in model.named_parameters() if ".original" not in name}
    operators = model.conv1.new, model.conv2.new
    seen: list[tuple[int, set[int], set[int]]] = []

    def look(row: EpochMetrics) -> None:
        (trainer,) = trainers
        groups = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        seen.append((row.epoch, groups, {id(p) for p in trainer.optimizer.optimizer.state}))

    finetune(model, data(), epochs=3, blend_epochs=1, on_epoch=look, **CPU)
    assert (model.conv1, model.conv2) == operators
    assert {name for name, _ in model.named_parameters()} == kept
    own = {id(p) for p in model.parameters()}
    before = seen[0][1]
    assert len(before) == len(own) + 3  # two filters and a bias
    assert own < before
    assert seen[1:] == [(epoch, own, own) for epoch in (1, 2, 3)]
    done = cs.record(model)
    assert done is not None
    assert {str(start) for start in done.starts.values()} == {"blend(t=1)"}


def test_what_the_optimizer_knows_of_the_others_is_kept(trainers: list[Trainer]) -> None:
    model = converted()
    moments: dict[int, Tensor] = {}

    def look(row: EpochMetrics) -> None:
        state = trainers[0].optimizer.optimizer.state
        if row.epoch:
            assert {int(state[p]["step"]) for p in model.parameters()} == {STEPS * row.epoch}
            moments[row.epoch] = state[model.fc.weight]["exp_avg"].clone()

    finetune(model, data(), epochs=3, blend_epochs=1, on_epoch=look, **CPU)
    assert not torch.equal(moments[1], moments[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-2},
        {"lr": 1e-2, "grad_accum_steps": 2, "warmup_epochs": 1.5},
        {"lr": 1e-2, "grad_accum_steps": 3, "layer_decay": 0.7},
        {"opt": "sgd", "lr": 1e-2, "sched": "step", "decay_epochs": 1, "sched_on_updates": False},
        {"opt": "lion", "sched": "none"},
        {"opt": "sgd", "lr": 1e-2, "sched": "poly", "amp": True},
        {"opt": "lamb", "lr": 1e-2},
        {"opt": "lookahead_adamw", "lr": 1e-2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_others_train_as_if_nothing_had_left(settings: dict[str, Any]) -> None:
    """State of the optimizer, rates, accumulation and random numbers: bit for bit as in a run without the change."""
    rule = "conv[name=aside]->kerv-poly(degree=2) by blend"
    torch.manual_seed(0)
    one = converted(rule, Aside())
    other = copy.deepcopy(one)
    result = finetune(one, data(), epochs=4, blend_epochs=1, **settings, **CPU)
    assert cs.blends(one) == {}
    expected = finetune(other, data(), epochs=4, blend="none", **settings, **CPU)
    assert cs.blends(other) == {"aside": 0.0}
    assert [row.lr for row in result.history] == [row.lr for row in expected.history]
    assert [row.val_loss for row in result.history] == [row.val_loss for row in expected.history]
    assert same(rest(one), rest(other))


def test_accumulated_gradients(trainers: list[Trainer]) -> None:
    model = converted()
    seen = ts(model, "conv1")
    finetune(model, data(), epochs=2, blend_epochs=1, grad_accum_steps=2, **CPU)
    assert seen == [k / 8 for k in range(1, 9)]  # with every batch, not only with every update
    steps = {int(state["step"]) for state in trainers[0].optimizer.optimizer.state.values()}
    assert steps == {STEPS}


# --- ε


NEUTRAL = "first-conv->kerv-poly by neutral(2.5e-2); last-conv->kerv-gauss(learnable) by neutral"


def eps_of(module: Any) -> float:
    return float(module.eps)


@pytest.mark.parametrize(("settings", "until"), [({}, 2), ({"nonlinearity_epochs": 1}, 1)], ids=["half", "one"])
def test_eps_rises_geometrically_and_is_held(settings: dict[str, Any], until: int) -> None:
    model = converted(NEUTRAL)
    start = cs.nonlinearity(model)
    assert start == {"conv1": pytest.approx(0.025), "conv2": 0}
    seen = {name: watch(model, name, eps_of) for name in start}
    finetune(model, data(), epochs=4, nonlinearity=0.5, **settings, **CPU)
    for name, first in start.items():
        way = [min(1.0, k / (until * STEPS)) for k in range(1, 4 * STEPS + 1)]
        # From 0 there is no equal ratio: the first step is to a thousandth of where it goes.
        begun = first or 0.5 / 1024
        assert seen[name] == pytest.approx([begun * (0.5 / begun) ** done for done in way], rel=1e-5)
        assert set(seen[name][until * STEPS - 1 :]) == {0.5}
    assert cs.nonlinearity(model) == {"conv1": 0.5, "conv2": 0.5}


def test_eps_stays_unless_asked() -> None:
    model = converted(NEUTRAL)
    start = cs.nonlinearity(model)
    finetune(model, data(), epochs=1, **CPU)
    assert cs.nonlinearity(model) == start


def test_eps_is_not_taken_back_when_more_epochs_follow(tmp_path: Path) -> None:
    model = converted(NEUTRAL)
    settings = {"output": tmp_path, "nonlinearity": 0.5, "sched": "constant", **CPU}
    finetune(model, data(), epochs=2, **settings)
    assert cs.nonlinearity(model) == {"conv1": 0.5, "conv2": 0.5}
    seen = watch(model, "conv1", eps_of)
    finetune(model, data(), epochs=8, resume=True, **settings)
    assert seen == [0.5] * 6 * STEPS


# --- stops and divergence


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_divergence_brings_back_t_and_eps(stop: int) -> None:
    """Diverged in epoch ``stop``; conv1 is half way after the first and has arrived after the second."""
    rule = "first-conv->kerv-poly(degree=2) by blend; conv[name=conv2]->kerv-gauss by blend"
    model = converted(rule)
    model = cs.convert(nn.Sequential(nn.Conv2d(1, 1, 1), model), "conv[name=0]->kerv-gauss(learnable) by neutral",
                       example_inputs=torch.randn(2, 1, 16, 16))  # fmt: skip
    images = data()[0].dataset.tensors[0][:8]
    before = copy.deepcopy(model)
    kept: dict[int, tuple[dict[str, float], dict[str, float], dict[str, Tensor], Tensor]] = {}
    count = 0

    def fail(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal count
        count += module.training
        return output * (math.nan if count == (stop - 1) * STEPS + 5 and module.training else 1.0)

    def answers() -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(model).eval()(images)

    def look(row: EpochMetrics) -> None:
        kept[row.epoch] = cs.blends(model), cs.nonlinearity(model), weights(model), answers()

    model[1].fc.register_forward_hook(fail)
    settings = {"epochs": 4, "blend_epochs": 4, "blend_order": "layers", "nonlinearity": 0.25, "divergence": None}
    with pytest.raises(TrainingError, match=rf"stopped at epoch {stop}, step 5: the loss is nan"):
        finetune(model, data(), lr=1e-3, on_epoch=look, **settings, **CPU)
    blends, eps, state, answer = kept[stop - 1]
    assert (cs.blends(model), cs.nonlinearity(model)) == (blends, eps)
    assert same(weights(model), state)
    assert torch.equal(answers(), answer)
    assert blends == {1: {"1.conv1": 0, "1.conv2": 0}, 2: {"1.conv1": 0.5, "1.conv2": 0}, 3: {"1.conv2": 0}}[stop]
    if stop == 1:
        assert torch.equal(before.eval()(images), answer)
    # What is at 0 again takes no part again.
    for name in (name for name, t in blends.items() if t == 0):
        for parameter in model.get_submodule(name).new.parameters():
            parameter.data.fill_(math.nan)
    assert torch.equal(answers(), answer)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, stop: int, loaded: bool) -> None:
    def begin() -> Any:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 1, 1), tiny())
        rule = "conv[name=0]->kerv-gauss(learnable) by neutral; conv[k=3]->kerv-poly(degree=2) by blend"
        return model, converted(rule, model)

    settings = {"epochs": 4, "blend_epochs": 2, "blend_order": "layers", "nonlinearity": 0.25, "lr": 1e-3, **CPU}
    _, whole = begin()
    finetune(whole, data(), output=tmp_path / "whole", **settings)

    def interrupt(row: EpochMetrics) -> None:
        if row.epoch == stop:
            raise KeyboardInterrupt

    base, model = begin()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data(), output=tmp_path / "parts", on_epoch=interrupt, **settings)
    left = {0: 2, 1: 1, 2: 0, 3: 0}[stop]
    assert len(cs.blends(model)) == left
    if loaded:
        model = cs.load(tmp_path / "parts" / "last", base=base)
        assert len(cs.blends(model)) == left
    else:
        _, model = begin()
        with torch.no_grad():  # its weights come from the folder
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    result = finetune(model, data(), output=tmp_path / "parts", resume=True, **settings)
    assert result.resumed_from == stop
    assert same(weights(model), weights(whole))
    assert cs.nonlinearity(model) == cs.nonlinearity(whole) == {"0": 0.25}
    assert cs.record(model) == cs.record(whole)
    plain = [{**row, "seconds": ""} for row in rows(tmp_path / "whole")]
    assert [{**row, "seconds": ""} for row in rows(tmp_path / "parts")] == plain
    back = cs.load(tmp_path / "parts" / "last", base=base)
    assert same(weights(back), weights(whole))


def test_states_of_before_these_settings_can_be_resumed(tmp_path: Path) -> None:
    settings = {"epochs": 2, "lr": 1e-3, **CPU}
    whole, model = converted(NEUTRAL), converted(NEUTRAL)
    finetune(whole, data(), **settings)

    def interrupt(row: EpochMetrics) -> None:
        if row.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, data(), output=tmp_path, on_epoch=interrupt, **settings)
    path = tmp_path / "last" / "training_state.pt"
    state = torch.load(path, weights_only=True)
    assert {"eps", "blends"} < set(state)
    for name in ("eps", "blends"):
        del state[name]
    new = {name for name in state["config"] if name.startswith(("blend", "nonlinearity"))}
    assert new == {"blend", "blend_epochs", "blend_order", "nonlinearity", "nonlinearity_epochs"}
    for name in new:
        del state["config"][name]
    torch.save(state, path)
    with pytest.raises(TrainingError, match=r"changed: nonlinearity None → 0\.5"):
        finetune(converted(NEUTRAL), data(), output=tmp_path, resume=True, nonlinearity=0.5, **settings)
    assert finetune(model, data(), output=tmp_path, resume=True, **settings).resumed_from == 1
    assert same(weights(model), weights(whole))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epochs": 2, "blend_epochs": 2.5}, r"blend_epochs must be at most epochs.*: 2\.5 of 2 \(--blend-epochs"),
        ({"epochs": 2, "nonlinearity_epochs": 3}, "nonlinearity_epochs must be at most epochs.*: 3 of 2"),
        ({"blend_epochs": 0}, r"blend_epochs must be above 0, not 0 \(--blend-epochs\)"),
        ({"nonlinearity_epochs": -1}, "nonlinearity_epochs must be above 0, not -1"),
        ({"blend": "cosin"}, r"blend cannot be 'cosin' \(--blend\); did you mean 'cosine'"),
        ({"blend_order": "layer"}, r"blend_order cannot be 'layer' \(--blend-order\); did you mean 'layers'"),
        ({"nonlinearity": 0}, "nonlinearity must be above 0 and at most 1, not 0"),
        ({"nonlinearity": 1.5}, "nonlinearity must be above 0 and at most 1, not 1.5"),
        ({"blend": 1}, "blend must be a word, not 1"),
    ],
)
def test_settings_that_are_not_legal(settings: dict[str, Any], text: str) -> None:
    model = converted()
    with pytest.raises(SettingsError, match=text):
        finetune(model, data(), **settings, **CPU)
    assert cs.blends(model) == {"conv1": 0.0, "conv2": 0.0}


# --- how large outputs grow


def grow(model: nn.Module, name: str, factors: dict[int, float]) -> None:
    """Multiply a layer's output by the factor of the last training step named."""
    count = 0

    def multiply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal count
        count += module.training
        begun = [step for step in factors if step <= count]
        return output * factors[max(begun)] if begun and module.training else output

    # Before the watch's own hook, which thus sees what comes out of this one.
    model.get_submodule(name).register_forward_hook(multiply)


def told(text: str) -> list[tuple[int, str, str, float]]:
    """Step, layer, its class and factor, of each line on a layer that grows."""
    pattern = r"epoch 1, step (\d+): the output of (\S+) \((\w+)\) is (\S+) times what it was at first; a smaller"
    return [(int(step), name, kind, float(x)) for step, name, kind, x in re.findall(pattern, text)]


SMALL: dict[str, Any] = {"epochs": 1, "lr": 1e-8, "warmup_epochs": 0, "divergence": None, "device": "cpu"}


def test_a_layer_that_grows_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted("all-conv->kerv-poly(degree=2) by neutral")
    # The watch looks at steps 1, 11, 21, …
    grow(model, "conv1", {11: 20.0, 21: 150.0, 31: 190.0, 41: 400.0})
    finetune(model, data(56, 4), **SMALL)
    (first, second) = told(capsys.readouterr().err)
    assert (first[:3], second[:3]) == ((11, "conv1", "PolyDial2d"), (41, "conv1", "PolyDial2d"))
    assert first[3] == pytest.approx(20, rel=0.2)
    assert second[3] == pytest.approx(400, rel=0.2)


def test_steady_layers_are_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted("all-conv->kerv-poly(degree=2) by neutral")
    grow(model, "conv1", {11: 8.0, 31: 0.1, 41: 8.0})
    finetune(model, data(48, 4), **SMALL)
    captured = capsys.readouterr()
    assert "epoch 1/1  train loss" in captured.err
    assert "the output of" not in captured.err


def test_blended_layers_are_watched_under_their_operators_name(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted("all-conv->kerv-poly(degree=2) by blend")
    grow(model, "conv2", {11: 50.0})
    finetune(model, data(16, 4), blend="none", **SMALL)
    assert [line[:3] for line in told(capsys.readouterr().err)] == [(11, "conv2", "PolyKervolution2d")]
    assert cs.blends(model) == {"conv1": 0.0, "conv2": 0.0}


def test_arrival_is_told_and_the_operator_is_watched_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted("first-conv->kerv-poly(degree=2) by blend")
    grow(model.conv1, "new", {15: 100.0})
    # Fifteen steps: 1 and 11 of the first epoch, with t going to 1, and 1 and 11 of the second without a blend.
    finetune(model, data(12, 4), **{**SMALL, "epochs": 2, "blend_epochs": 1})
    text = capsys.readouterr().err
    assert text.count("1 blended layers have arrived at their operators; the convolutions are gone") == 1
    assert "epoch 2, step 11: the output of conv1 (PolyKervolution2d) is " in text


def test_a_run_that_stops_names_the_layer_that_grew_most() -> None:
    model = converted("all-conv->kerv-poly(degree=2) by neutral")
    grow(model, "conv1", {11: 20.0})
    grow(model, "conv2", {11: 300.0, 21: math.nan})
    with pytest.raises(TrainingError, match="epoch 1, step 21: the loss is nan") as caught:
        finetune(model, data(24, 4), progress=False, **SMALL)
    assert "the output of conv2 (PolyDial2d) is nan times what it was at first" in str(caught.value)
    assert "the output of conv1" not in str(caught.value)
    assert no_hooks_but_mine(model, 2)

    model = converted("all-conv->kerv-poly(degree=2) by neutral")
    grow(model, "conv1", {11: 20.0})
    grow(model, "conv2", {11: 300.0})
    grow(model, "fc", {19: math.nan})
    with pytest.raises(TrainingError, match="epoch 1, step 19: the loss is nan") as caught:
        finetune(model, data(24, 4), progress=False, **SMALL)
    (found,) = re.findall(r"the output of (\w+) \(PolyDial2d\) is (\d+) times", str(caught.value))
    assert found[0] == "conv2"
    assert float(found[1]) == pytest.approx(300, rel=0.2)

    model = converted("all-conv->kerv-poly(degree=2) by neutral")
    grow(model, "fc", {3: math.nan})
    with pytest.raises(TrainingError, match="epoch 1, step 3: the loss is nan") as caught:
        finetune(model, data(24, 4), progress=False, **SMALL)
    assert "times what it was at first" not in str(caught.value)


def no_hooks_but_mine(model: nn.Module, mine: int) -> bool:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == mine


def test_hooks_are_gone_after_the_run() -> None:
    model = converted()
    during: list[bool] = []

    def look(row: EpochMetrics) -> None:
        during.append(no_hooks_but_mine(model, 0))
        if row.epoch == 2:
            raise KeyboardInterrupt

    finetune(model, data(), epochs=1, blend="none", on_epoch=look, **CPU)
    assert during == [False, False]
    assert no_hooks_but_mine(model, 0)
    # Also after operators have taken the places of blends.
    with pytest.raises(KeyboardInterrupt):
        finetune(model, data(), epochs=3, blend_epochs=1, on_epoch=look, **CPU)
    assert not any(during)
    assert cs.blends(model) == {}
    assert no_hooks_but_mine(model, 0)


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"sched": "wsd", "decay_epochs": 50}], ids=["settings", "schedule"])
def test_hooks_are_gone_after_a_run_that_was_refused(change: dict[str, Any], tmp_path: Path) -> None:
    finetune(converted(), data(), epochs=1, output=tmp_path, **CPU)
    model = converted()
    with pytest.raises(TrainingError, match=r"changed: lr|schedule 'wsd' cannot be made"):
        finetune(model, data(), epochs=1, output=tmp_path, resume=True, **change, **CPU)
    assert no_hooks_but_mine(model, 0)


# --- several processes


SCRIPT = """
    import sys, torch
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import convsurgery as cs
    from convsurgery.adapt import finetune
    from test_schedule import converted, data, ts

    torch.set_num_threads(1)
    out = Path({out!r})
    model = converted()
    begin = model.state_dict()["conv1.original.weight"].clone()
    first, second = ts(model, "conv1"), ts(model, "conv2")
    settings = dict(lr=1e-3, device="cpu", log_interval=0)
    # Resting parts, of either kind, take no gradient but are waited for.
    for t in (0.0, 1.0):
        other = converted()
        cs.set_blend(other, t)
        finetune(other, data(), epochs=1, blend="none" if t == 0 else "linear", progress=False, **settings)
        assert list(cs.blends(other)) == (["conv1", "conv2"] if t == 0 else []), cs.blends(other)
    finetune(model, data(), epochs=4, blend_epochs=3, blend_order="layers", output=out / "run", **settings)
    rank = torch.distributed.get_rank()
    kinds = [type(module).__name__ for module in model.modules()]
    torch.save((model.state_dict(), kinds, cs.blends(model), first, second), out / f"rank{{rank}}.pt")
    torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    done = launch(tmp_path, SCRIPT, "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    assert done.stderr.count("have arrived at their operators") == 2
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(one[0], two[0])
    assert one[1:] == two[1:]
    _, kinds, blends, first, second = one
    assert blends == {}
    assert "Blend" not in kinds
    assert "Conv2d" not in kinds
    # Half of the batches each; the layers share three epochs.
    assert first == float32([min(1.0, k / 6) for k in range(1, 9)])
    assert second == float32([max(0.0, k / 6 - 1) for k in range(1, 13)])
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1", "2", "3", "4"]
    back = cs.load(tmp_path / "run" / "last", base=tiny())
    assert same(weights(back), one[0])
    assert not any(isinstance(module, Blend) for module in back.modules())
