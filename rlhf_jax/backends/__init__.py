"""How each operation is computed on each kind of device, and what a process asks of its machine."""
