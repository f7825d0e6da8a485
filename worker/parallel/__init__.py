"""Parallelism: the ranks of a replica, modules that hold their part of a weight, and sequences that ranks share."""
