"""What the parts of a merge compute: features, clusters, neuron orders, merged blocks."""
