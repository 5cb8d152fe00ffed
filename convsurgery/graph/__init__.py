"""Reads models, changes nothing: sites, tracing, patterns."""

from convsurgery.graph.arguments import as_arguments, call
from convsurgery.graph.blocks import Candidate, find_blocks
from convsurgery.graph.calls import count_calls
from convsurgery.graph.copying import copy_model
from convsurgery.graph.holders import Place, holders
from convsurgery.graph.instance import own_attributes, own_method
from convsurgery.graph.sites import Observation, aliases, observe
from convsurgery.graph.templates import Template
from convsurgery.graph.tracing import Region, followers, regions, trace, trace_owner

__all__ = [
    "Candidate",
    "Observation",
    "Place",
    "Region",
    "Template",
    "aliases",
    "as_arguments",
    "call",
    "copy_model",
    "count_calls",
    "find_blocks",
    "followers",
    "holders",
    "observe",
    "own_attributes",
    "own_method",
    "regions",
    "trace",
    "trace_owner",
]
