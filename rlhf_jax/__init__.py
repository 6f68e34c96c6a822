"""InstructGPT in JAX: pure array functions, one struct vocabulary, flat readable experiments."""

__version__ = "0.1.0"
