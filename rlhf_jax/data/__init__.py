"""Records, tokens and batches: everything before the first device. numpy only."""
