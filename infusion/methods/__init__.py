"""The customisation methods: each is a file of this package with one `Method` of the same name."""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from infusion.methods.base import Method
from ldm.util.cli import UserError
from ldm.util.config import check_params

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept


def method_names() -> list[str]:
    """The methods that there are, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def find_method(name: str) -> type[Method]:
    """The method's class.

    Raises:
        ValueError: there is no such method.
    """
    if name not in method_names():
        raise UserError(f"there is no method {name!r}; there are: {', '.join(method_names())}")
    found = vars(import_module(f"{__name__}.{name}")).values()
    return next(cls for cls in found if isinstance(cls, type) and vars(cls).get("name") == name)


def acts_everywhere(name: str) -> bool:
    """Whether a method's concepts act on prompts without their words too; not where there is no such method."""
    return name in method_names() and find_method(name).everywhere


def method_of(concept: "Concept") -> Method:
    """The method as a concept was trained with it.

    Raises:
        ValueError: there is no such method, or none with these options.
    """
    method = find_method(concept.method)
    check_params(method, dict(concept.options), "options")
    return method.from_concept(concept)
