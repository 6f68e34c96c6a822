"""Rewards that are computed from texts: functions of a researcher's own, and the gold scorer of a
small world.
"""
