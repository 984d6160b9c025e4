"""Other processes that take turns: peers in environments of their own, and our own restarts."""
