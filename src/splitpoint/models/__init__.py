"""What MODEL names on the command line, and how it is loaded."""

from .catalogue import load

__all__ = ["load"]
