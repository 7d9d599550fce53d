"""moetool prune: experts go. method.py is the frame; every other file is one way to say which."""
