"""Step plane and request plane, and the processes of ranks."""
