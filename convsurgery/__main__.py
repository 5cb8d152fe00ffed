"""``python -m convsurgery`` is the command line."""

from convsurgery.cli import main

main()
