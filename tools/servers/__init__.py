"""The embedded backends: what a tool talks to over HTTP where the user has no server of their own."""
