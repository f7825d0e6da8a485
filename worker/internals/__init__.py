"""Undocumented names of libraries that workers use: one file per library, each with the version checked.

``tests/worker/test_internals.py`` asserts that every name exists, and CI also tries the newest releases.
"""
