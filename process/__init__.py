"""Process plumbing: the start of child processes, logs, configuration and IP addresses."""
