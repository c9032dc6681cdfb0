"""What serves calls: ranges and their functions, weights in other layouts, and warm starts."""
