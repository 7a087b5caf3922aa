"""What Penstock claims, as programs."""
