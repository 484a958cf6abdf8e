"""What a GPU could do at most, and what it does: the roofline, and a GPU's first benchmark."""
