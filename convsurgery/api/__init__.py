"""The public functions, all in one place; each is documented where it is defined."""

from convsurgery import models as models  # makes their names known to timm
from convsurgery.adapt.choose import choose, draw_trade_off, trade_off
from convsurgery.adapt.evaluation import evaluate
from convsurgery.adapt.finetuning import finetune
from convsurgery.adapt.scan import scan
from convsurgery.api.calibrating import calibrate
from convsurgery.api.choosing import auto, measure_choices
from convsurgery.api.converting import convert, convert_
from convsurgery.api.exporting import export_onnx, verify_onnx
from convsurgery.api.planning import pattern, plan
from convsurgery.operators import list_operators
from convsurgery.rules import list_selectors
from convsurgery.surgery import (
    apply,
    blends,
    finish_blend,
    fuse,
    load,
    nonlinearity,
    record,
    save,
    set_blend,
    set_nonlinearity,
)
from convsurgery.zoo import create_model, load_checkpoint

__all__ = [
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
]
