"""The model that a replica serves: its loaded pipeline, and the kinds of request that it performs."""
