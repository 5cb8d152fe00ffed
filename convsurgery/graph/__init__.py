"""Reads models, changes nothing: sites, tracing, patterns."""

from convsurgery.graph.blocks import Candidate, find_blocks
from convsurgery.graph.copying import copy_model
from convsurgery.graph.sites import Observation, aliases, observe
from convsurgery.graph.templates import Template
from convsurgery.graph.tracing import Region, followers, regions, trace, trace_owner

__all__ = [
    "Candidate",
    "Observation",
    "Region",
    "Template",
    "aliases",
    "copy_model",
    "find_blocks",
    "followers",
    "observe",
    "regions",
    "trace",
    "trace_owner",
]
