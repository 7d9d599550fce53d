"""How a model's matrices are rounded (a file a method), and which of them to what."""
