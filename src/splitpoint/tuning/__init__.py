"""Measuring, and choosing by what was measured."""
