"""Leave out of a config's signature what the library fills in: its fields with `metadata=STATE`."""

from __future__ import annotations

from typing import Any

import griffe


class SettableFields(griffe.Extension):
    """Show the fields of a config that a user sets."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Drop the parameters of every config, once its signature is made of its fields."""
        for module in [pkg, *_modules(pkg)]:
            for own in module.classes.values():
                if not own.is_alias and "__init__" in own.members:
                    filled_in = {name for name, field in own.all_members.items() if _is_state(field)}
                    init = own.members["__init__"]
                    for name in filled_in & {parameter.name for parameter in init.parameters}:
                        del init.parameters[name]


def _modules(module: griffe.Module) -> list[griffe.Module]:
    found = [part for part in module.modules.values() if not part.is_alias]
    return [*found, *(below for part in found for below in _modules(part))]


def _is_state(field: Any) -> bool:
    return field.is_attribute and "metadata=STATE" in str(field.value)
