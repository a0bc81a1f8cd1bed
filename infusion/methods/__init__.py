"""The customisation methods by name."""

from infusion.methods.infusion import Infusion

METHODS = {Infusion.name: Infusion}


def find_method(name: str) -> type:
    """The method's class.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; there are: {', '.join(sorted(METHODS))}")
    return METHODS[name]
