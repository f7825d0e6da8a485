"""Undocumented names of libraries, one file per library with the version checked; a model's blocks and their arguments.

``tests/worker/test_internals.py`` asserts that every name exists, and CI also tries the newest releases.
"""
