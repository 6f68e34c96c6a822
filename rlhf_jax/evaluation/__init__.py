"""Measuring a trained model: win rates, reward-model quality, over-optimisation, the alignment tax, the report."""
