"""Decides who runs: admission, priority, deadlines, which replica, and whether it lives. Never touches a tensor."""
