"""A callable once as one graph, and everything that the graph relied on."""
