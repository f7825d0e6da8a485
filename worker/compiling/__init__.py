"""Regional compilation: repeated blocks of components, compiled in the background and verified before they serve."""
