"""Upcycling as a grammar: SITE, ASSEMBLE, CARVE, DIVERSIFY, ROUTE, SHARED, SCALE - one file a
primitive.
"""
