"""Ray actors, the Serve application, and how it is launched."""
