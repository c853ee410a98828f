"""Evaluation: generate -> score -> report, each stage resumable, each leaving files. One task per file.

Knows: tasks, methods, files of one run. Must not know how anything is trained or served.
"""
