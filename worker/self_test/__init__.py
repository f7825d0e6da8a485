"""The self-test at load: whether the pipeline runs, and how its requests may share forwards."""
