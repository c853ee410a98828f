"""Beams in, fewer and longer beams out: the loop, the selections, the table of methods. No torch."""
