"""Where the tensors of a checkpoint live in a running module, and how they get there."""
