"""What every run shares: its parts made from a config, its loop thread, its manifest, its progress."""
