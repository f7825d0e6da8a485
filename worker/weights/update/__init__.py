"""New weights into a running module, and back out of it while the update is not committed."""
