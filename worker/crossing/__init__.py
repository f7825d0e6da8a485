"""The boundary between a pipeline and its components: a request's coroutine crosses it with each call."""
