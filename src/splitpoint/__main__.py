"""`python -m splitpoint`."""

from __future__ import annotations

import sys

from .cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
