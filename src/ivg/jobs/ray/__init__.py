"""Many machines: one file of prompts shared out over a Ray cluster (extra ``ray``, which is imported only here)."""
