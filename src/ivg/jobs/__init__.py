"""Rows in, rows out: readers of all formats, the run loop over backends, resumable files of results and their provenance."""
