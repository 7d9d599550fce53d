"""moetool merge: experts become one. method.py is the frame; each other file is a published method
(a choice of the parts) or a part.
"""
