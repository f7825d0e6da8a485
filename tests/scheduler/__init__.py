"""The scheduler's decisions, driven by hand with explicit times, and its process, over real sockets."""
