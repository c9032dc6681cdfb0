"""Runs the straight-line code of a range in C++ instead of Python."""
