"""Experiments: flags and ``run(config, workdir)``; each stage alone, and `instructgpt`, which runs
them all.
"""
