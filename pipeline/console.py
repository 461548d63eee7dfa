"""The console that every message to the user goes through."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # what others wrote is text
