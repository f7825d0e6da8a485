"""Fewer forwards for a request: calls that are predicted and made beside others, and answers that are reused."""
