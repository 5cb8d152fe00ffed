"""Sweeps over architectures: what is seen, planned and converted, and whether models stay what they are."""

from convsurgery.coverage.report import summary_text, write_table
from convsurgery.coverage.row import CHECKS, Row, read_rows
from convsurgery.coverage.sample import HARD
from convsurgery.coverage.sweep import choose, sweep

__all__ = ["CHECKS", "HARD", "Row", "choose", "read_rows", "summary_text", "sweep", "write_table"]
