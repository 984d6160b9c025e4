"""One cache for a machine: a store in a process of its own, and the doors to it."""
