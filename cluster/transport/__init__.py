"""The step plane and the processes at its ends."""
