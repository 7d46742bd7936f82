"""unclip: text to image by CLIP latents, the DALL·E 2 stack (arXiv 2204.06125)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unclip.pipeline import UnCLIP

__version__ = "0.1.0"
__all__ = ["UnCLIP", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import, so the pipeline comes with its first use
    if name == "UnCLIP":
        from unclip.pipeline import UnCLIP

        return UnCLIP
    raise AttributeError(f"module 'unclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
