"""The HTTP server, which also starts and supervises the other processes. It never imports torch."""
