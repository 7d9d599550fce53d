"""What runs in a stock transformers model in the place of its experts: matrices that stay in the
form in which they are stored.
"""
