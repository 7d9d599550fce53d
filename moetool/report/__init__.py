"""What is written beside the weights: model card and provenance."""
