"""The command line: verbs and their arguments."""
