"""All-reduce, residual add, RMSNorm and quantisation as one step, where it pays."""
