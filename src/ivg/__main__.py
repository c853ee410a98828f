"""``python -m ivg``."""

from ivg.cli import main

main()
