"""The oracle: an independent Mixtral in float64, forward and backward."""
