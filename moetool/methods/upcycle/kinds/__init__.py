"""Kinds of experts that no stock class holds: one file each, found by itself. What its tensors are,
which operations make them, what the config says of them, its certificate, and what it refuses.
"""
