"""gptoss: an event-sourced server for gpt-oss and other causal language models."""
