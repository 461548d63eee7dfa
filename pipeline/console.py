"""Console for all messages to the user."""

from __future__ import annotations

from rich.console import Console

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # markup off: names may hold brackets
