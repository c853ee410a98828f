"""Evaluation of methods on tasks: generate, score, report. Each stage writes files and resumes."""
