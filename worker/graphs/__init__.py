"""Piecewise CUDA graphs: the kernels of a component's repeated blocks, recorded once and launched as one."""
