"""C++ kernels for a step of a Llama-like model on a CPU, compiled at first use; ``runner`` is the engine's door to them."""
