"""Records, tokens and batches: everything that runs before a device is used, in numpy."""
