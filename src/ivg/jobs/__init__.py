"""Rows in, rows out: readers of every format, what rows were made from, files that a run goes on with. Imports no torch."""
