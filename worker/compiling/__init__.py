"""Regional compilation: the repeated blocks of components, compiled in the background and judged before they serve."""
