"""From a callable to compiled pieces: capture, pieces, specialise, stitch."""
