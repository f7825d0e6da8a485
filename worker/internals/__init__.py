"""Undocumented names of libraries that workers use, one file per library with the version checked; a model's blocks.

``tests/worker/test_internals.py`` asserts that every name exists, and CI also tries the newest releases.
"""
