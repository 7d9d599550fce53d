"""How scores become experts and weights: one file a law, found by itself. Which options it has,
what the config says of it, and what it means for a model at birth.
"""
