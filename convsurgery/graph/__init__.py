"""Reads models, changes nothing: sites, tracing, patterns."""

from convsurgery.graph.copying import copy_model
from convsurgery.graph.sites import Observation, aliases, observe
from convsurgery.graph.tracing import followers, trace

__all__ = ["Observation", "aliases", "copy_model", "followers", "observe", "trace"]
