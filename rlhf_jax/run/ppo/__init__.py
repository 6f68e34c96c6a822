"""What running PPO takes beside the algorithm: its settings, its parts before the first step,
memory, alarms.
"""
