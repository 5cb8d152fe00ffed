"""Benchmarks: every number is a ratio to a named peer, measured in the same run; medians of several rounds."""

from convsurgery.bench.report import run_bench

__all__ = ["run_bench"]
