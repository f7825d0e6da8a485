"""The mathematics of rollouts: one code for the server, which draws them, and for trainers, which learn from them."""
