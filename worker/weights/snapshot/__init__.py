"""Whole tensors out of a running module: digests, files, and the journal of commits."""
