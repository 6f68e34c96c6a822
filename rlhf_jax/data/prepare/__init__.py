"""From what a user has to the files that the stages read: by source, cut into parts, cleaned,
measured.
"""
