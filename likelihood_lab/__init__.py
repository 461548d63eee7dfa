"""The audit of loss functions, for Python and pytest.

    from likelihood_lab import assert_same_loss
    assert_same_loss(my_cross_entropy, torch.nn.functional.cross_entropy)

A shim over `pipeline.check`, which is imported when one of its names is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.check import Finding, assert_same_loss, capture, check

__all__ = ["Finding", "assert_same_loss", "capture", "check"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"likelihood_lab has no {name!r}; it has {', '.join(__all__)}")
    import pipeline.check

    return getattr(pipeline.check, name)
