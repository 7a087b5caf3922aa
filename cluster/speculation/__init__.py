"""What to draft, and how much of it to verify: drafters, controllers and what they learn. Pure state, no torch."""
