"""What quantizing does to a whole model: the swap, its state, its clock."""
