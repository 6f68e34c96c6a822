"""What running PPO takes besides the algorithm: settings, set-up, compiled phases, alarms."""
