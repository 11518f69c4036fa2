"""The embedded backends: servers for tools whose user has no server of their own."""
