"""Measuring trained models: win rates, reward models, over-optimisation, the alignment tax."""
