"""The actor runtime and the deciding actors."""
