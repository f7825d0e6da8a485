"""Tests of graphs, recorded on the CPU."""
