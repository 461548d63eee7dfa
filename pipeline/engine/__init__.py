"""R plain modules trained as one."""
