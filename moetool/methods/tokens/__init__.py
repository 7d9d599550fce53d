"""add-tokens: rows for new tokens in embeddings and head."""
