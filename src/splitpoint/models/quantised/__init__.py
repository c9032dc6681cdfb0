"""Checkpoints whose weights somebody else quantised: in 4 or 8 bits, kept so."""
