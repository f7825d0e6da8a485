"""What workers use of libraries beyond their documented interface: one file per library, each with the version checked.

``tests/worker/test_internals.py`` asserts that every name is there, and CI tries the newest releases, too.
"""
