"""Everything that crosses a process boundary: messages, their codec, errors and the configuration."""
