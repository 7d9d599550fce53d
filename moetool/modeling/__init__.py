"""What runs in a stock transformers model: experts in the form in which they are stored, in the
place of its own, and groups of experts that no stock class has, in the place of its FFNs.
"""
