"""Packages whose public names are imported when first used (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package with a table `_HOMES`: public name to the module, within it, that has it.

    A submodule may bear a public function's name, as `merge` does. Python would put the module in
    the function's place when it is imported; here the function stays.
    """

    def __getattr__(self, name: str) -> Any:
        homes = self.__dict__.get("_HOMES", {})
        if name not in homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{homes[name]}", self.__name__), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("_HOMES", {})):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(self.__dict__["_HOMES"])
