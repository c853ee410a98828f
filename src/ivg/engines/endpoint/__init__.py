"""The engine over an OpenAI-compatible completions endpoint."""
