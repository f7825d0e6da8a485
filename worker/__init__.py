"""A replica's ranks: pipelines, the boundary around their components, and the batcher that merges their calls."""
