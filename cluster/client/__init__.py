"""The engine and a server as Python objects."""
