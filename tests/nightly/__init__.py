"""Tests that take many minutes, collected where ``TEST_EFFORT=nightly``; ``TEST_SCALE=0.02`` does a little of each."""
