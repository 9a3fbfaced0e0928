"""The engine: model code, its process, and the port that the rest of the system sees."""
