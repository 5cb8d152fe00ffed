"""Pretrained models by name: building them, loading weights by hand, input sizes, and what a model was built from."""

from convsurgery.zoo.allowed import check_arguments, check_recorded_name, is_plain_name
from convsurgery.zoo.budget import Budget
from convsurgery.zoo.build import create_model
from convsurgery.zoo.checkpoint import load_checkpoint
from convsurgery.zoo.identify import identify
from convsurgery.zoo.inputs import example_inputs, input_kind
from convsurgery.zoo.names import Base, list_models
from convsurgery.zoo.origin import Origin, note_origin, origin_of
from convsurgery.zoo.preprocessing import preprocessing, set_preprocessing
from convsurgery.zoo.sizes import input_size, set_input_size

__all__ = [
    "Base",
    "Budget",
    "Origin",
    "check_arguments",
    "check_recorded_name",
    "create_model",
    "example_inputs",
    "identify",
    "input_kind",
    "input_size",
    "is_plain_name",
    "list_models",
    "load_checkpoint",
    "note_origin",
    "origin_of",
    "preprocessing",
    "set_input_size",
    "set_preprocessing",
]
