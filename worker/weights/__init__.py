"""Where checkpoint tensors live in a running module, and how they get there."""
