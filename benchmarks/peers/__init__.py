"""What a user would take instead of ivg, on the same models and prompts: ``python -m benchmarks.peers``."""
