"""Reinforcement learning of a diffusion model that a server draws with: Flow-GRPO, small enough for two cores."""
