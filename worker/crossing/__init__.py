"""The boundary between a pipeline and its components, crossed in the coroutine of a request."""
