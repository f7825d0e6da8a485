"""Tensor parallelism: the ranks of a replica, and modules that hold their part of a weight."""
