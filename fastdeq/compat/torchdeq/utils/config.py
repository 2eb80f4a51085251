"""Where the classes look for their options: a namespace, a mapping, or an object's attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DEQConfig:
    """Options by name, copied: what is passed in is left as it is.

    Args:
        config: an ``argparse.Namespace``, a mapping, another ``DEQConfig``, an object whose
            attributes are options, or None. Names that nothing asks for are never looked at.
    """

    def __init__(self, config: Any = None):
        if config is None:
            config = {}
        elif isinstance(config, DEQConfig):
            config = config.config
        elif not isinstance(config, Mapping):
            config = vars(config)
        self.config: dict[str, Any] = dict(config)

    def get(self, key: str, default: Any = None) -> Any:
        """The option, or ``default`` where it is not set."""
        return self.config.get(key, default)

    def update(self, **kwargs: Any) -> None:
        """Sets options."""
        self.config.update(kwargs)
