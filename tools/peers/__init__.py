"""Other libraries timed on the same work: stand-alone scripts, each run in its own environment."""
