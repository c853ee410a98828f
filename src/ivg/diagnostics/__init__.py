"""Diagnostics before compute is spent: compatibility of models, divergence, pair accuracy, a verdict (``ivg check``)."""
