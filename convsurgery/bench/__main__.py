"""``python -m convsurgery.bench [ops|convert|all]`` is ``convsurgery bench``."""

import sys

from convsurgery.cli import main

main(["bench", *sys.argv[1:]])
