"""The only package that edits a model: plan, apply, record, fuse, save and load."""

from convsurgery.surgery.apply import apply, apply_
from convsurgery.surgery.blend import blend_modules, blends, finish_blend, set_blend
from convsurgery.surgery.decide import make_plan
from convsurgery.surgery.dial import nonlinearity, set_nonlinearity
from convsurgery.surgery.fuse import fuse
from convsurgery.surgery.plan import Entry, Plan
from convsurgery.surgery.record import Record, changed_names, record, unwrap, weights_of
from convsurgery.surgery.storage import load, load_weights, named_folder, save

__all__ = [
    "Entry",
    "Plan",
    "Record",
    "apply",
    "apply_",
    "blend_modules",
    "blends",
    "changed_names",
    "finish_blend",
    "fuse",
    "load",
    "load_weights",
    "make_plan",
    "named_folder",
    "nonlinearity",
    "record",
    "save",
    "set_blend",
    "set_nonlinearity",
    "unwrap",
    "weights_of",
]
