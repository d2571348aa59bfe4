"""``python -m descentlab.cli``: the console script without installing it."""

from .main import main

main()
