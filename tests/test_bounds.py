"""Everything ends: what would take for ever, or all memory, is an error of ours that says what is too much."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import convsurgery as cs
from convsurgery.errors import (
    ConversionError,
    ConvSurgeryError,
    DataError,
    ExportError,
    ModelError,
    NoMatchError,
    RuleError,
    StorageError,
)

X = torch.randn(1, 3, 16, 16)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()


class Named(nn.Module):
    """A convolution whose name takes an expression with nested repetitions for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 40 + "b", nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return next(iter(self.children()))(x)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$", "(.*)*(.*)*(.*)*x", "(a*)*c"])
def test_regular_expressions_end(pattern: str) -> None:
    began = time.perf_counter()
    with pytest.raises((RuleError, NoMatchError), match=r"takes too long|no convolution matches"):
        cs.plan(Named(), f"conv[name=/{pattern}/]->conv", example_inputs=X)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("pattern", ["(a{60000}){60000}", "(((a{99}){99}){99}){99}", "(?:x{0,9999}){99}", "a" * 3000])
def test_expressions_that_grow_when_they_are_compiled(pattern: str) -> None:
    with pytest.raises(RuleError, match="is too large for a name"):
        cs.parse(f"conv[name=/{pattern}/]->conv")


def test_an_expression_that_takes_too_long_is_shown() -> None:
    with pytest.raises(RuleError) as caught:
        cs.plan(Named(), "conv[k=1, name=/(a|a)*$/]->conv", example_inputs=X)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("/(a|a)*$/ takes too long")
    assert lines[2].count("^") == len("/(a|a)*$/")


def test_many_tests_and_rules_take_no_longer_than_they_are_many() -> None:
    tests = ", ".join(f"name!=x{number}" for number in range(10_000))
    began = time.perf_counter()
    assert len(cs.plan(net(), f"conv[{tests}]->conv", example_inputs=X).edits) == 2
    assert len(cs.plan(net(), "; ".join(["conv[k=3]->conv"] * 5_000), example_inputs=X).edits) == 1
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("pnn(fanout=100000)", "fanout wants an integer from 1 to 256, not 100000"),
        ("pnn(masks=3000000)", "masks=3000000 are 1000000 for each of 3 channels; at most 256"),
        ("lbc(filters=100000000)", "filters=100000000: at most 8,192 for each group of channels"),
        ("kerv-poly(degree=1000)", "degree wants an integer from 1 to 64, not 1000"),
        ("kerv-poly(degree=1000000000)", "degree wants an integer from 1 to 64"),
    ],
)
def test_arguments_that_ask_for_too_much(rule: str, text: str) -> None:
    with pytest.raises(ConvSurgeryError, match=text):
        cs.convert(net(), f"first-conv->{rule}", example_inputs=X)


def test_auto_is_not_nested() -> None:
    for depth in (2, 500, 5000):
        with pytest.raises(RuleError, match="auto is no operator to choose"):
            cs.parse("all-conv->" + "auto(" * depth + "conv" + ")" * depth)


@pytest.mark.parametrize("value", [None, 3, b"all-conv->conv", [], {}, object()], ids=range(6))
def test_rules_are_texts(value: Any) -> None:
    with pytest.raises(RuleError, match="a rule is read from a text"):
        cs.parse(value)
    if not isinstance(value, list):
        with pytest.raises(RuleError):
            cs.plan(net(), value, example_inputs=X)


@pytest.mark.parametrize("value", [None, 3, "text", object(), nn.Conv2d], ids=range(5))
def test_models_are_modules(value: Any, tmp_path: Path) -> None:
    for use in (
        lambda: cs.convert(value, "all-conv->conv"),
        lambda: cs.save(value, tmp_path / "out"),
        lambda: cs.export_onnx(value, tmp_path / "m.onnx"),
        lambda: cs.nonlinearity(value),
    ):
        with pytest.raises(ModelError, match=r"a model is a torch\.nn\.Module"):
            use()
    assert list(tmp_path.iterdir()) == []


def test_starts_are_texts() -> None:
    with pytest.raises(ConvSurgeryError, match="a start is a text"):
        cs.plan(net(), "all-conv->conv", example_inputs=X, start=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [3, "abc", {1: X}, {"other": X}])
def test_example_inputs_of_other_kinds(example: Any) -> None:
    with pytest.raises(ModelError):
        cs.plan(net(), "all-conv->conv", example_inputs=example)


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.conv(pixel_values)


def test_arguments_by_keyword(tmp_path: Path) -> None:
    model = ByName().eval()
    new = cs.convert(model, "all-conv->kerv-gauss", example_inputs={"pixel_values": X})
    assert torch.equal(new(pixel_values=X), model(pixel_values=X))
    assert cs.plan(model, "all-conv->conv", example_inputs={"pixel_values": X, "scale": 2.0}).seen == "FX and hooks"
    with pytest.raises(ModelError, match=r"by keyword: pass example_inputs=\{'pixel_values'"):
        cs.plan(model, "all-conv->conv")
    with pytest.raises(ExportError, match="inputs are positional"):
        cs.export_onnx(new, tmp_path / "m.onnx", example_inputs={"pixel_values": X})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=dtype))
    with pytest.raises(ConversionError, match=f"its weight is {dtype}"):
        cs.convert(model, "all-conv->kerv-poly", example_inputs=X.to(dtype))


CONFIGS = [3, "x", [1], {"input_size": "big"}, {"input_size": (3, -1, 5)}, {"input_size": (3, 10**6, 10**6)}]
CONFIGS += [{"input_size": (3,)}, {"input_size": None}, {"architecture": 3}, {1: 2}, object(), {"first_conv": 7}]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_what_a_model_says_of_itself_may_be_anything(config: Any, tmp_path: Path) -> None:
    model = net()
    model.pretrained_cfg = config
    assert len(cs.plan(model, "all-conv->kerv-poly").edits) == 2
    new = cs.convert(model, "all-conv->kerv-poly")
    with pytest.warns(cs.errors.ConvSurgeryWarning, match="does not say what it was built from"):
        cs.save(new, tmp_path / "out")
    assert torch.equal(cs.load(tmp_path / "out", base=net())(X), new(X))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    @property
    def pretrained_cfg(self) -> Any:
        raise RuntimeError("no configuration here")

    @property
    def anything(self) -> Any:
        raise ValueError("nor this")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Made(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "conv"):
            self.conv = nn.Conv2d(3, 3, 1)
        out: Tensor = self.conv(x)
        return out


class Deleted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "two"):
            del self.two
        out: Tensor = self.one(x)
        return out


def test_models_that_do_strange_things() -> None:
    assert type(cs.convert(Raises(), "all-conv->kerv-poly", example_inputs=X).conv) is not nn.Conv2d
    with pytest.raises(NoMatchError, match="the model has no Conv2d"):
        cs.plan(Made(), "all-conv->conv", example_inputs=X)
    with pytest.raises(ModelError, match="two is gone after one forward pass"):
        cs.plan(Deleted(), "all-conv->conv", example_inputs=X)


@pytest.mark.parametrize("path", ["a\0b", "/tmp/" + "a" * 5000, "a" * 300, ""], ids=["nul", "long", "name", "no"])
def test_paths_that_are_none(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for use, kind in (
        (lambda: cs.load(path), StorageError),
        (lambda: cs.save(net(), path), StorageError),
        (lambda: cs.load_checkpoint(net(), path), ModelError),
        (lambda: cs.export_onnx(net(), path, example_inputs=X), ExportError),
        (lambda: cs.verify_onnx(path, net()), ExportError),
        (lambda: cs.evaluate(net(), path), DataError),
    ):
        with pytest.raises(kind):
            use()
    assert list(tmp_path.iterdir()) == []


def endless(path: Path) -> None:
    """A file whose Loop has no end."""
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["held"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("held", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [yes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_a_loop_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convsurgery.export import parity

    endless(tmp_path / "m.onnx")
    monkeypatch.setattr(parity, "_SECONDS", 2.0)
    with pytest.raises(ExportError, match=r"is not done with m\.onnx .* after 2 s"):
        cs.verify_onnx(tmp_path / "m.onnx", net(), example_inputs=X)
    deadline = time.monotonic() + 20
    while any(thread.name == "convsurgery-onnxruntime" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the runtime was not stopped"
        time.sleep(0.1)


def classes() -> set[int]:
    gc.collect()
    return {id(found) for found in gc.get_objects() if issubclass(type(found), type)}


def test_no_class_is_left_behind() -> None:
    model = cs.create_model("resnet10t", img_size=32)
    rule = "residual->rd-explicit; conv-bn->fused"
    x = torch.randn(1, 3, 64, 64)
    try:
        cs.convert(model, rule, example_inputs=x)
    except ConversionError:  # of the smallest network every shortcut may be projected
        model, rule = cs.create_model("resnet18"), "residual->rd-explicit"
        cs.convert(model, rule, example_inputs=x)
    before = classes()
    for _ in range(3):
        cs.convert(model, rule, example_inputs=x)
    assert len(classes() - before) <= 1


def test_the_spectrum_of_another_size_does_not_come_between() -> None:
    layer = cs.convert(cs.create_model("resnet18"), "residual->rd-implicit", example_inputs=torch.randn(1, 3, 64, 64))
    step = next(m for m in layer.modules() if type(m).__name__ == "ReactionDiffusion2d").eval()
    sizes = [(torch.randn(1, step.channels, size, size)) for size in (8, 12)]
    with torch.no_grad():
        wanted = [step(x) for x in sizes]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(200):
                    assert torch.equal(step(sizes[index]), wanted[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_copies_made_in_inference_mode_train() -> None:
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        given = torch.randn(2, 3, 16, 16)
        for new in (
            cs.convert(net(), "first-conv->kerv-poly; last-conv->pnn", example_inputs=x),
            cs.convert(net(), "first-conv->lbc by fit", example_inputs=given, calibration=given),
        ):
            with torch.inference_mode(False):
                new.train()(x).sum().backward()
                assert all(p.grad is not None for p in new.parameters())


def test_plans_of_shapes_that_no_tensor_has() -> None:
    model = net()
    data = cs.plan(model, "all-conv->kerv-poly", example_inputs=X).to_dict()
    for shape in ([2**40, 2**40, 2**40, 2**40], [2**61, 3, 16, 16]):
        with pytest.raises(ConvSurgeryError):
            cs.apply(model, cs.Plan.from_dict({**data, "input_shapes": [shape]}))


def test_a_structural_place_that_nothing_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from convsurgery.rules import places

    monkeypatch.setattr(places, "_PLACES", dict(places._PLACES))
    places.register_selector(places.SelectorPlace("my-block", "", "structure"))
    with pytest.raises(RuleError, match="registered as a pattern of several layers, and nothing finds it"):
        cs.plan(net(), "my-block->block", example_inputs=X)
