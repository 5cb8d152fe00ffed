"""Operators as ONNX nodes: the translation table for the exporter, and the function bodies for the finished file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import torch
from onnx import defs
from onnxscript import values

from convsurgery.errors import ExportError
from convsurgery.operators import list_operators, operator
from convsurgery.operators.onnx import DOMAIN, VERSION, NodeForm, OnnxFunction

__all__ = ["attach_functions", "custom_nodes", "translation_table"]

#: names of the first two inputs of every node, as in ONNX's own Conv
_LEADING = ("X", "W")


def _functions() -> dict[str, OnnxFunction]:
    configs = [operator(name) for name in list_operators()]
    found = (function for config in configs for function in (config.onnx, *config.more_onnx))
    return {function.op_type: function for function in found if function is not None}


def _function_of(node: onnx.NodeProto, functions: Mapping[str, OnnxFunction]) -> OnnxFunction:
    """Its attributes may be part of a node's type."""
    return functions.get(node.op_type) or functions[node.op_type.partition("_")[0]]


def _inputs(function: OnnxFunction) -> tuple[str, ...]:
    return (*_LEADING, *function.inputs[len(_LEADING) :])


def _schema(function: OnnxFunction, op_type: str, optional: set[str]) -> defs.OpSchema:
    kinds = defs.OpSchema.FormalParameterOption
    inputs = [
        defs.OpSchema.FormalParameter(name, "T", param_option=kinds.Optional if name in optional else kinds.Single)
        for name in _inputs(function)
    ]
    integers = [*function.attributes, *(v for k, v in function.window.items() if k == "groups")]
    lists = [name for name in function.window.values() if name not in integers]
    attributes = [
        *(defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.STRING, "", required=True) for name in function.strings),
        *(defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, "", required=True) for name in integers),
        *(defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INTS, "", required=True) for name in lists),
    ]
    return defs.OpSchema(
        op_type,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[defs.OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=attributes,
    )


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export``: every op of ours becomes one node in domain ``ai.convsurgery``."""
    return dict(_translation(function) for function in _functions().values())


def _translation(function: OnnxFunction) -> tuple[Any, Callable[..., Any]]:
    op = getattr(torch.ops.convsurgery, function.torch_op).default
    arguments = [argument.name for argument in op._schema.arguments]
    optional = {a.name for a in op._schema.arguments if isinstance(a.type, torch.OptionalType)}

    def translate(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(arguments, args, strict=False)), **kwargs}
        if given.get("scale") is not None:
            raise ExportError(f"{function.op_type} still has a scale; fuse() the model before exporting it")
        attributes: dict[str, Any] = {name: int(given[name]) for name in function.attributes}
        attributes |= {name: str(given[name]) for name in function.strings}
        for name, attribute in function.window.items():
            value = given[name]
            # torch's symmetric (vertical, horizontal) padding is begin and end of each axis in ONNX.
            attributes[attribute] = int(value) if name == "groups" else [int(v) for v in value]
        if "pads" in attributes:
            attributes["pads"] = attributes["pads"] * 2
        kind = function.node_type(attributes)
        node = values.Op(values.Opset(DOMAIN, VERSION), kind, _schema(function, kind, optional))
        return node(*(given.get(name) for name in function.inputs), **attributes)

    return op, translate


def custom_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of our domain, in the order of execution."""
    return (node for node in model.graph.node if node.domain == DOMAIN)


def attach_functions(model: onnx.ModelProto) -> None:
    """Give every node of ours its meaning as a model-local function of standard operators.

    A body that depends on the node (degree, optional inputs) is one overload of the function; ``node.overload``
    chooses.
    """
    functions = _functions()
    attached: dict[tuple[str, str], onnx.FunctionProto] = {}
    shapes = _shapes(model.graph)
    for node in custom_nodes(model):
        function = _function_of(node, functions)
        form = _form(function, node, shapes)
        node.overload = function.overload(form)
        key = (node.op_type, node.overload)
        if key not in attached:
            attached[key] = _proto(function, node, form, model)
    model.functions.extend(attached.values())


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Of every value whose rank is known; -1 for a dynamic size."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
    return found


def _form(function: OnnxFunction, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> NodeForm:
    attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    words = {a.name: a.s.decode() for a in node.attribute if a.type == onnx.AttributeProto.STRING}
    lists = {a.name: tuple(a.ints) for a in node.attribute if a.type == onnx.AttributeProto.INTS}
    names = _inputs(function)
    given = {name: value for name, value in zip(names, node.input, strict=False) if value}
    known = {name: shapes[value] for name, value in given.items() if value in shapes}
    return NodeForm(attributes, frozenset(given), words, lists, known)


def _proto(function: OnnxFunction, node: onnx.NodeProto, form: NodeForm, model: onnx.ModelProto) -> onnx.FunctionProto:
    standard = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    attributes = [*function.attributes, *function.strings, *function.window.values()]
    lines = "\n".join(f"  {line}" for line in function.body(form))
    names = list(_inputs(function))
    # A node leaves out what is absent at its end; onnx's reference runtime wants as many inputs as the function has.
    while names[-1] not in form:
        names.pop()
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {standard}]>\n'
        f"{node.op_type} <{', '.join(attributes)}> ({', '.join(names)}) => (Y)\n{{\n{lines}\n}}"
    )
    try:
        proto = onnx.parser.parse_function(text)
    except onnx.parser.ParseError as error:
        which = f"{node.op_type} ({node.overload})" if node.overload else node.op_type
        raise ExportError(f"the body of {which} does not parse: {error}\n{text}") from error
    proto.overload = node.overload
    # The checker wants a function's imports to equal the model's.
    del proto.opset_import[:]
    proto.opset_import.extend(model.opset_import)
    return proto
