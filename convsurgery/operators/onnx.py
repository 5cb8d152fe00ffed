"""What an operator means in ONNX: one node in our domain, and a function body of standard operators.

Bodies are written as ONNX text, so that this module needs no onnx; ``convsurgery.export`` parses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["CONV_ATTRIBUTES", "DOMAIN", "VERSION", "NodeForm", "OnnxFunction"]

DOMAIN = "ai.convsurgery"
VERSION = 1

#: torch argument of a convolution → attribute of the ONNX node (and of ONNX's own Conv)
CONV_ATTRIBUTES = {"stride": "strides", "padding": "pads", "dilation": "dilations", "groups": "group"}


@dataclass(frozen=True)
class NodeForm:
    """The traits of one node that change its body.

    Attributes:
        attributes: the node's integer attributes (``degree``, ``centered``, ``group``, ...).
        present: names of the optional inputs that are given.
        words: the node's text attributes (``act``, ``pool``, ...).
        lists: its lists of integers (``pads``, ``strides``, ...).
        shapes: of its inputs, as far as they are known; a dynamic size is -1.
    """

    attributes: Mapping[str, int]
    present: frozenset[str]
    words: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def centered(self) -> bool:
        return bool(self.attributes.get("centered"))

    @property
    def grouped(self) -> bool:
        return self.attributes["group"] != 1

    def __contains__(self, name: str) -> bool:
        return name in self.present


@dataclass(frozen=True)
class OnnxFunction:
    """An operator's node and its body.

    Attributes:
        op_type: the node's type in domain ``ai.convsurgery``.
        torch_op: name of the op in ``torch.ops.convsurgery`` that becomes the node.
        inputs: the op's tensor arguments, in order; the torch op and the node share their names.
        attributes: the op's integer arguments besides those of a convolution.
        overload: a word for every :class:`NodeForm` with a body of its own.
        body: ONNX text of the statements that compute ``Y`` from the inputs.
        strings: the op's text arguments.
        window: its arguments that have another name in ONNX, a convolution's by default.
        named_by: those of its attributes whose values belong to the node's type, as ``_name3``: for bodies that differ
            with them, without an overload, which not every runtime knows.
    """

    op_type: str
    torch_op: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    overload: Callable[[NodeForm], str]
    body: Callable[[NodeForm], Sequence[str]]
    strings: tuple[str, ...] = ()
    window: Mapping[str, str] = field(default_factory=lambda: CONV_ATTRIBUTES)
    named_by: tuple[str, ...] = ()

    def node_type(self, attributes: Mapping[str, int]) -> str:
        """The type of a node with these attributes."""
        return self.op_type + "".join(f"_{name}{attributes[name]}" for name in self.named_by)
