"""Turns the user's source into the files that the stages read: split, cleaned and measured."""
