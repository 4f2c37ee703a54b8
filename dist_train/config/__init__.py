"""The config: what a run is, read from YAML and checked. Nothing here imports torch or another room."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import load_config
    from .schema import Config

__all__ = ["Config", "load_config"]


def __getattr__(name: str) -> Any:
    # Late, so that `--help` and the rooms that only need errors or durations don't import pydantic.
    if name == "load_config":
        from .load import load_config

        return load_config
    if name == "Config":
        from .schema import Config

        return Config
    raise AttributeError(f"module {__name__} has no attribute {name}")
