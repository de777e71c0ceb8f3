"""YAML and command line, parsed into the settings of a job."""
