"""A replica: the pipeline, the boundary around its components, and the loop that decides what runs together."""
