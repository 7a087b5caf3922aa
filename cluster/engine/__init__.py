"""The engine loop: requests, scheduling, drafting, commit. No Ray, no sockets."""
