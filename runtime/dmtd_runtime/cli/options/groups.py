"""A verb takes a dataclass of options whole; typer sees its fields one by one.

    def bench(bundle: BundleArgument = None, *, backend: BackendGroup = BackendOptions()) -> None: ...

``BackendGroup`` is ``Annotated[BackendOptions, Group({...})]``: which fields are options, in which order, and their help. Types
are the dataclass's, defaults those of the verb's own default, so that command line and API cannot differ.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_type_hints

import typer


@dataclass(frozen=True, slots=True)
class Group:
    """The fields of a dataclass that are options: name -> what ``option`` makes."""

    options: Mapping[str, Any]

    def only(self, *names: str) -> Group:
        """Some of them."""
        return Group({name: self.options[name] for name in names})


def option(text: str, *flags: str, panel: str | None = None, **settings: Any) -> Any:
    """One option of a group. ``flags``: how it is written, where that is not the field's name."""
    return typer.Option(*flags, help=text, rich_help_panel=panel, **settings)


def takes_groups(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as typer wants it: each of its groups replaced by the group's options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for each in inspect.signature(verb, eval_str=True).parameters.values():
        group = next((part for part in getattr(each.annotation, "__metadata__", ()) if isinstance(part, Group)), None)
        if group is None:
            parameters.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(get_args(each.annotation)[0])
        groups[each.name] = (each.default, tuple(group.options))
        parameters += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(each.default, name),
                annotation=Annotated[hints[name], made],
            )
            for name, made in group.options.items()
        ]

    @functools.wraps(verb)
    def flat(**given: Any) -> Any:
        for name, (default, names) in groups.items():
            given[name] = replace(default, **{each: given.pop(each) for each in names})
        return verb(**given)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat
