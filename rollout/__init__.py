"""The mathematics of rollouts, shared by the server that samples them and the trainers that learn from them."""
