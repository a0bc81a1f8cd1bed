"""Files of weights: reading, names, recognising, export."""
