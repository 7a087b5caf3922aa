"""Who talks to whom: engine loop, scheduling, drafting, Ray actors, Serve app, client, CLI."""
