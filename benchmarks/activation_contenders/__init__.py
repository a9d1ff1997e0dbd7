"""Ways to keep activations until backward, all behind one face."""
