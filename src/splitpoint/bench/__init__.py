"""Measurements a user can repeat: each prints a table and writes JSON."""
