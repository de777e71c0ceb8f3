"""The search for a plan: short runs, the finals, and the proxy model."""
