"""The process of one rank: its start, its loop, and its engine."""
