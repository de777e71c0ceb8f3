"""Tables, plots and the report of a search."""
