"""The OpenAI-compatible HTTP/SSE surface."""
