"""Weights in page-locked host memory, which come to the GPU for a forward, whole or block by block."""
