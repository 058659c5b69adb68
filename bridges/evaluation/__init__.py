"""How good a bridge is, and whether its answers come from the picture at all."""
