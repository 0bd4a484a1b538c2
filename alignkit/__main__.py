"""``python -m alignkit`` is ``alignkit``."""

from alignkit.cli import main

main()
