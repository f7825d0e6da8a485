"""Requests in progress: each output is a sample, a call of the pipeline in a coroutine of its own."""
