"""Responses from a language model: one batch (`generate`), or more prompts than rows (`refill`)."""
