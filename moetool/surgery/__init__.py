"""The tensor-surgery core: every checkpoint moetool writes goes through here. Knows no method by
name.
"""
