"""Rewards that are computed from texts by functions of the user's."""
