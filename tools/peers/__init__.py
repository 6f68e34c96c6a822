"""Other libraries timed on the same work: stand-alone scripts, each run in that library's own
environment.
"""
