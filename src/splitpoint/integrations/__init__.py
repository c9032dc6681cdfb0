"""Other programs that can use this package: a folder each, which alone may import the program."""
