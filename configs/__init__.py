"""Configs: one file an experiment, with ``get_config(arg)``."""
