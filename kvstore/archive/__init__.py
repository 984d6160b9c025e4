"""Blocks in a file: written by one store, read by another, on this machine or elsewhere."""
