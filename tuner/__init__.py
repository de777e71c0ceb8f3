"""The search for the fold levels that train best inside a memory budget."""
