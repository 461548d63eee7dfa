"""The configuration: its schema, its checks, and everything about Hydra."""
