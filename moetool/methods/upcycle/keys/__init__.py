"""What routes look at: one file a key, found by itself. Which options it has, what the config says
of it, which tensors a router has at birth, and what it refuses.
"""
