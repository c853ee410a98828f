"""OpenAI's Responses API for text, over chat completions: nothing is stored."""
