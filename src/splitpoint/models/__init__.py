"""What MODEL names on the command line: catalogue, weights, and the tensor-parallel model."""
