"""Files and folders of a run, written atomically."""
