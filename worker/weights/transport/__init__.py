"""How a trainer's tensors reach this rank: files, pickled payloads, CUDA handles and broadcasts."""
