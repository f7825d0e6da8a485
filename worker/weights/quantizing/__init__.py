"""Linear layers whose weights lie in 8 bits on the device, while the checkpoint's own values stay on the host."""
