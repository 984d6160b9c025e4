"""How fast each path is, measured in one run beside the ceiling that it is judged by."""
