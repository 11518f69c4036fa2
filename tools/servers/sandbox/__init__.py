"""A code sandbox: SandboxFusion's HTTP routes, each program isolated by bubblewrap."""
