"""Every operator as ONNX: one node with its body, or standard ops alone, and what ONNX Runtime makes of both.

The expected values are the float64 formulas of ``naive``, not what the package's own layers compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import naive
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from operator_table import KERVOLUTIONS, NEUTRAL, TABLE, Row
from torch import Tensor, nn

import convsurgery
from convsurgery.errors import ParityError
from convsurgery.operators.kervolution import Dialled

DOMAIN = "ai.convsurgery"
#: What would make or shift a matrix of patches.
PATCH_OPS = {"Im2Col", "Unfold", "Col2Im", "GatherND", "GatherElements", "ScatterND"}

all_rows = pytest.mark.parametrize("row", TABLE, ids=str)
inlined = pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Side(nn.Module):
    """Several layers on one image, their outputs in one row: one export instead of many."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x).flatten(1) for layer in self.layers], 1)


#: Geometry, bias, and form: everything that gives a node a body of its own, or other attributes.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("paper", {"kernel_size": 3, "padding": 1}),
    ("paper", {"kernel_size": 2, "groups": 2, "stride": (2, 1), "bias": False}),
    ("plain", {"kernel_size": (2, 3), "padding": "same", "groups": 2}),
    ("centered", {"kernel_size": 3, "dilation": (1, 2), "padding": (2, 1)}),
    ("centered", {"out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1, "padding_mode": "reflect"}),
    ("bare", {"kernel_size": 1, "bias": False}),
)
#: The dialled form has one body; what changes is in its inputs and attributes.
DIALLED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("start", {"kernel_size": 3, "padding": 1}),
    ("start", {"kernel_size": 2, "groups": 2, "stride": (2, 1), "bias": False}),
    ("dialled", {"kernel_size": (2, 3), "padding": "same", "groups": 2}),
    ("dialled", {"out_channels": 4, "kernel_size": 3, "groups": 4, "padding": 1, "padding_mode": "reflect"}),
    ("dialled", {"kernel_size": 3, "dilation": (1, 2), "padding": (2, 1), "bias": False}),
    ("neutral(0.5)", {"kernel_size": 1}),
    ("neutral(1e-3)", {"kernel_size": 3, "bias": False}),
)


def variants(row: Row) -> tuple[tuple[str, dict[str, Any]], ...]:
    return (*VARIANTS, *DIALLED) if row.neutral else VARIANTS


def make_layer(row: Row, form: str, options: dict[str, Any]) -> nn.Module:
    conv = nn.Conv2d(4, **{"out_channels": 6, **options})
    if row.kernel is None or form == "paper":
        return row.layer(conv)
    if form == "dialled":
        return row.dialled(conv)
    if form == "start" or form.startswith("neutral"):
        return row.layer(conv, form.replace("start", "neutral"))
    layer = row.full(conv, centered=form in ("centered", "bare"))
    if form == "bare":  # centred, without gain and bias
        layer.scale = layer.gain = layer.offset = None
    return layer


def make_model(row: Row) -> Side:
    torch.manual_seed(0)
    return Side([make_layer(row, form, options) for form, options in variants(row)])


def images(batch: int) -> Tensor:
    return torch.randn(batch, 4, 7, 6, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that exports a row's model once and remembers the file."""

    @cache
    def export(rule: str, inline: bool) -> tuple[Path, Side]:
        row = next(row for row in TABLE if row.rule == rule)
        model, path = make_model(row), tmp_path_factory.mktemp("onnx") / "model.onnx"
        convsurgery.export_onnx(model, path, inline=inline, example_inputs=images(2), tolerance=row.onnx or 1e-6)
        return path, model

    return export


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def all_nodes(graph: Any) -> Iterator[onnx.NodeProto]:
    """Of a graph or function body, loops and branches included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def custom(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.domain == DOMAIN]


@all_rows
@inlined
def test_onnxruntime_computes_the_formula(row: Row, inline: bool, exported: Any) -> None:
    path, model = exported(row.rule, inline)
    run = session(path)
    assert [i.name for i in run.get_inputs()] == ["input"]
    assert [o.name for o in run.get_outputs()] == ["output"]
    for batch in (1, 2, 3):
        x = images(batch)
        (got,) = run.run(None, {"input": x.numpy()})
        parts = [(naive.convolve if row.kernel is None else row.naive)(layer, x).flatten(1) for layer in model.layers]
        columns = np.split(got, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        for column, part, variant in zip(columns, parts, variants(row), strict=True):
            assert naive.error(torch.from_numpy(column), part) <= (row.onnx or 1e-6), variant


def node_type(row: Row, layer: nn.Module) -> str:
    if not isinstance(layer, Dialled):
        return row.op_type
    degree = f"_degree{layer.degree}" if row.op == "kerv_poly" else ""
    return row.op_type.replace("Kervolution2d", "Dial2d") + degree


@all_rows
def test_one_node_per_operator_with_its_body(row: Row, exported: Any) -> None:
    path, model = exported(row.rule, False)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    nodes = custom(proto)
    if row.kernel is None:
        assert not nodes
        assert not proto.functions
        return
    assert [node.op_type for node in nodes] == [node_type(row, layer) for layer in model.layers]
    assert {o.domain: o.version for o in proto.opset_import} == {"": 18, DOMAIN: 1}
    bodies = {(f.domain, f.name, f.overload) for f in proto.functions}
    assert len(bodies) == len(proto.functions)
    assert bodies == {(DOMAIN, node.op_type, node.overload) for node in nodes}
    # One body of the dialled form, which every runtime that knows functions finds by its name.
    assert len([f for f in proto.functions if "Dial2d" in f.name]) == bool(row.neutral)
    assert not any(node.overload for node in nodes if "Dial2d" in node.op_type)
    # The convolution itself is inside the node, nothing of it beside.
    assert not [node for node in proto.graph.node if node.op_type in ("Conv", "Loop", "Exp", "Tanh", "Sqrt")]
    assert not [node for function in proto.functions for node in all_nodes(function) if node.domain == DOMAIN]


@all_rows
def test_inlined_file_knows_standard_ops_only(row: Row, exported: Any) -> None:
    path, _ = exported(row.rule, True)
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain for o in proto.opset_import} == {""}
    assert {node.domain for node in all_nodes(proto.graph)} <= {"", "ai.onnx"}
    assert not proto.functions


@all_rows
@inlined
def test_no_patch_matrix_in_the_file(row: Row, inline: bool, exported: Any) -> None:
    path, _ = exported(row.rule, inline)
    proto = onnx.load(str(path))
    nodes = [*all_nodes(proto.graph), *(node for function in proto.functions for node in all_nodes(function))]
    assert not {node.op_type for node in nodes} & PATCH_OPS
    assert len(proto.SerializeToString()) < 200_000


@pytest.mark.parametrize("row", KERVOLUTIONS, ids=str)
def test_shapes_of_custom_nodes_are_written(row: Row, exported: Any) -> None:
    path, model = exported(row.rule, False)
    proto = onnx.load(str(path))
    shapes = {value.name: value.type.tensor_type.shape for value in proto.graph.value_info}
    x = images(2)
    for node, layer in zip(custom(proto), model.layers, strict=True):
        batch, *rest = shapes[node.output[0]].dim
        assert batch.dim_param
        assert [dim.dim_value for dim in rest] == list(layer(x).shape[1:])


@pytest.mark.parametrize("row", KERVOLUTIONS, ids=str)
def test_attributes_are_the_layers_options(row: Row, exported: Any) -> None:
    path, model = exported(row.rule, False)
    for node, layer in zip(custom(onnx.load(str(path))), model.layers, strict=True):
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert found["strides"] == list(layer.stride)
        assert found["dilations"] == list(layer.dilation)
        assert found["group"] == layer.groups
        assert len(found["pads"]) == 4
        assert found.get("centered", 0) == int(layer.centered)
        assert ("centered" in found) != isinstance(layer, Dialled)
        assert found.get("degree") == getattr(layer, "degree", None)


def test_no_power_with_a_slow_exponent(exported: Any) -> None:
    """ONNX Runtime's Pow is many times slower than multiplications from exponent 4 on."""
    path, _ = exported("kerv-poly(degree=5, balance=0.5)", True)
    assert "Pow" not in {node.op_type for node in all_nodes(onnx.load(str(path)).graph)}


@pytest.mark.parametrize("opset", [20, 23])
@inlined
def test_other_opsets(opset: int, inline: bool, tmp_path: Path) -> None:
    """All operators in one file; opset 18 is what the other tests write."""
    torch.manual_seed(0)
    firsts = list({row.op: row for row in KERVOLUTIONS}.values())
    model, path = Side([make_layer(row, *VARIANTS[3]) for row in firsts]), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, inline=inline, opset=opset, example_inputs=images(2))
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import} == {"": opset, **({} if inline else {DOMAIN: 1})}
    assert [node.op_type for node in custom(proto)] == ([] if inline else [row.op_type for row in firsts])
    x = images(3)
    (got,) = session(path).run(None, {"input": x.numpy()})
    parts = [row.naive(layer, x).flatten(1) for row, layer in zip(firsts, model.layers, strict=True)]
    columns = np.split(got, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    for row, column, part in zip(firsts, columns, parts, strict=True):
        assert naive.error(torch.from_numpy(column), part) <= row.onnx, row.rule


@inlined
@pytest.mark.parametrize("size", [1.0, 65_535.0, 1e-6])
def test_neutral_start_survives_the_file(inline: bool, size: float, tmp_path: Path) -> None:
    """At every size of the inputs the file is as near to the convolution as a file of the convolution itself."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 6, 3, groups=1 + index % 2, padding=1) for index in range(len(NEUTRAL))]
    layers = [row.layer(conv, "neutral") for row, conv in zip(NEUTRAL, convs, strict=True)]
    model, path = Side(layers), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, inline=inline, example_inputs=size * images(2))
    x = size * images(3)
    (got,) = session(path).run(None, {"input": x.numpy()})
    for row, conv, column in zip(NEUTRAL, convs, np.split(got, len(convs), axis=1), strict=True):
        assert naive.error(torch.from_numpy(column), naive.convolve(conv, x).flatten(1)) < 5e-7, row.rule


def test_two_degrees_in_one_file_have_two_names(tmp_path: Path) -> None:
    """An older runtime that does not look at overloads must not take one body for the other."""
    torch.manual_seed(0)
    rows = {row.rule: row for row in KERVOLUTIONS}
    pair = [rows["kerv-poly"], rows["kerv-poly(degree=2)"]]
    model, path = Side([row.layer(nn.Conv2d(4, 6, 3), "neutral(0.5)") for row in pair]), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, example_inputs=images(2))
    proto = onnx.load(str(path))
    assert [node.op_type for node in custom(proto)] == ["PolyDial2d_degree3", "PolyDial2d_degree2"]
    for function in proto.functions:
        assert function.overload == ""
    x = images(3)
    reference = onnx.reference.ReferenceEvaluator(proto).run(None, {"input": x.numpy()})[0]
    wanted = torch.cat([row.naive(layer, x).flatten(1) for row, layer in zip(pair, model.layers, strict=True)], 1)
    assert naive.error(torch.from_numpy(reference), wanted) < 2e-6


@pytest.mark.parametrize("row", NEUTRAL, ids=str)
@pytest.mark.parametrize("start", ["neutral", "neutral(1e-6)", "neutral(0.01)"])
def test_bodies_hold_in_half_precision(row: Row, start: str, tmp_path: Path) -> None:
    """Step by step in float16, as a GPU would: no filter is too small for it, no gain or sum of squares too large."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 6, 3, padding=1)
    layer, path = row.layer(conv, start), tmp_path / "model.onnx"
    x = 4 * torch.randn(2, 64, 7, 6, generator=torch.Generator().manual_seed(5))
    convsurgery.export_onnx(Side([layer]), path, inline=True, example_inputs=x)
    half = in_half(onnx.load(str(path)))
    (got,) = onnx.reference.ReferenceEvaluator(half).run(None, {"input": x.half().numpy()})
    assert got.dtype == np.float16
    wanted = row.naive(layer, x.half().double()).flatten(1)
    assert naive.error(torch.from_numpy(got), wanted) < (2e-3 if start != "neutral(0.01)" else 1e-2)


def in_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every float32 a float16."""
    kinds = {onnx.TensorProto.FLOAT: onnx.TensorProto.FLOAT16}
    for tensor in proto.graph.initializer:
        if tensor.data_type in kinds:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        kind = value.type.tensor_type
        kind.elem_type = kinds.get(kind.elem_type, kind.elem_type)
    for node in all_nodes(proto.graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name in ("value", "value_float"):
                value = attribute.f if attribute.name == "value_float" else onnx.numpy_helper.to_array(attribute.t)
                if np.asarray(value).dtype in (np.float32, np.float64):
                    made = onnx.helper.make_attribute(
                        "value", onnx.numpy_helper.from_array(np.array(value, np.float16))
                    )
                    attribute.CopyFrom(made)
    return proto


def test_batch_may_be_fixed(tmp_path: Path) -> None:
    model, path = make_model(KERVOLUTIONS[0]), tmp_path / "model.onnx"
    convsurgery.export_onnx(model, path, example_inputs=images(3), dynamic_batch=False)
    assert session(path).get_inputs()[0].shape == [3, 4, 7, 6]


def test_wrong_body_is_found_before_the_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in KERVOLUTIONS if row.rule == "kerv-sigmoid")
    right = row.config.onnx
    assert right is not None
    wrong = replace(right, body=lambda form: [line.replace("Tanh", "Sin") for line in right.body(form)])
    monkeypatch.setattr(type(row.config), "onnx", wrong)
    path = tmp_path / "model.onnx"
    with pytest.raises(ParityError, match=r"The first node that differs: layers\.0"):
        convsurgery.export_onnx(make_model(row), path, example_inputs=images(2))
    assert not list(tmp_path.iterdir())
