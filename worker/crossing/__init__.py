"""What happens between a pipeline and its components, in the coroutine of a request."""
