"""Beams to longer beams: the transformers engine, its sampling and its token guidance."""
