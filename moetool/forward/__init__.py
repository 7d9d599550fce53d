"""Text through a model, one layer in memory at a time: documents, batches, the walk, and what it
sees of the experts.
"""
