"""What `tests/bench/house.py` counts, a file a kind."""
