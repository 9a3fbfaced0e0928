"""The command line: one module for each command, and ``main`` for what they share."""
