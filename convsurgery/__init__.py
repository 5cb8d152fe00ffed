"""convsurgery: replace the convolutions of pretrained vision models, and keep what they predict.

>>> import timm, convsurgery as cs
>>> model = timm.create_model("resnet18")
>>> new = cs.convert(model, "first-conv->kerv-poly")
>>> type(new.conv1).__name__
'PolyDial2d'
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convsurgery import errors as errors
    from convsurgery import functional as functional
    from convsurgery.adapters import Adapter as Adapter
    from convsurgery.adapters import register_adapter as register_adapter
    from convsurgery.api import apply as apply
    from convsurgery.api import auto as auto
    from convsurgery.api import blends as blends
    from convsurgery.api import calibrate as calibrate
    from convsurgery.api import choose as choose
    from convsurgery.api import convert as convert
    from convsurgery.api import convert_ as convert_
    from convsurgery.api import create_model as create_model
    from convsurgery.api import draw_trade_off as draw_trade_off
    from convsurgery.api import evaluate as evaluate
    from convsurgery.api import export_onnx as export_onnx
    from convsurgery.api import finetune as finetune
    from convsurgery.api import finish_blend as finish_blend
    from convsurgery.api import fuse as fuse
    from convsurgery.api import list_operators as list_operators
    from convsurgery.api import list_selectors as list_selectors
    from convsurgery.api import load as load
    from convsurgery.api import load_checkpoint as load_checkpoint
    from convsurgery.api import measure_choices as measure_choices
    from convsurgery.api import nonlinearity as nonlinearity
    from convsurgery.api import pattern as pattern
    from convsurgery.api import plan as plan
    from convsurgery.api import record as record
    from convsurgery.api import save as save
    from convsurgery.api import scan as scan
    from convsurgery.api import set_blend as set_blend
    from convsurgery.api import set_nonlinearity as set_nonlinearity
    from convsurgery.api import trade_off as trade_off
    from convsurgery.api import verify_onnx as verify_onnx
    from convsurgery.errors import ConvSurgeryError as ConvSurgeryError
    from convsurgery.geometry import Site as Site
    from convsurgery.operators import Block as Block
    from convsurgery.operators import Conv as Conv
    from convsurgery.operators import Fused as Fused
    from convsurgery.operators import KervGauss as KervGauss
    from convsurgery.operators import KervL1 as KervL1
    from convsurgery.operators import KervL2 as KervL2
    from convsurgery.operators import KervLinear as KervLinear
    from convsurgery.operators import KervPoly as KervPoly
    from convsurgery.operators import KervSigmoid as KervSigmoid
    from convsurgery.operators import Lbc as Lbc
    from convsurgery.operators import LinearMix as LinearMix
    from convsurgery.operators import OperatorConfig as OperatorConfig
    from convsurgery.operators import OperatorLayer as OperatorLayer
    from convsurgery.operators import Pnn as Pnn
    from convsurgery.operators import RDCirculant as RDCirculant
    from convsurgery.operators import RDExplicit as RDExplicit
    from convsurgery.operators import RDImplicit as RDImplicit
    from convsurgery.operators import register_operator as register_operator
    from convsurgery.rules import parse as parse
    from convsurgery.surgery import Plan as Plan
    from convsurgery.surgery import Record as Record

#: public name → module that defines it; loaded on first use, so that the command line answers at once
_LAZY = {
    **dict.fromkeys(
        (
            "apply",
            "auto",
            "blends",
            "calibrate",
            "choose",
            "convert",
            "convert_",
            "create_model",
            "draw_trade_off",
            "evaluate",
            "export_onnx",
            "finetune",
            "finish_blend",
            "fuse",
            "list_operators",
            "list_selectors",
            "load",
            "load_checkpoint",
            "measure_choices",
            "nonlinearity",
            "pattern",
            "plan",
            "record",
            "save",
            "scan",
            "set_blend",
            "set_nonlinearity",
            "trade_off",
            "verify_onnx",
        ),
        "convsurgery.api",
    ),
    **dict.fromkeys(
        (
            "Block",
            "Conv",
            "Fused",
            "KervGauss",
            "KervL1",
            "KervL2",
            "KervLinear",
            "KervPoly",
            "KervSigmoid",
            "Lbc",
            "LinearMix",
            "OperatorConfig",
            "OperatorLayer",
            "Pnn",
            "RDCirculant",
            "RDExplicit",
            "RDImplicit",
            "register_operator",
        ),
        "convsurgery.operators",
    ),
    **dict.fromkeys(("Adapter", "register_adapter"), "convsurgery.adapters"),
    **dict.fromkeys(("Plan", "Record"), "convsurgery.surgery"),
    "ConvSurgeryError": "convsurgery.errors",
    "Site": "convsurgery.geometry",
    "parse": "convsurgery.rules",
}
_MODULES = ("errors", "functional")

__all__ = ["__version__", *_LAZY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:
    # Files of torch.export and TorchScript name the operators' torch ops and do not load where nobody registered them.
    importlib.import_module(f"{__name__}.functional")
