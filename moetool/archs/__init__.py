"""Model families as data: `families/` is generated from transformers, `overlay.json` and `pairs/`
are written by hand.
"""
