"""Measurements made into pictures and pages."""
