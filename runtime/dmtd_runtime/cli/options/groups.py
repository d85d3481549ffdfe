"""A verb takes a dataclass of options whole; typer sees its fields one by one.

    def bench(bundle: BundleArgument = None, *, backend: BackendGroup = BackendOptions()) -> None: ...

``BackendGroup`` is ``Annotated[BackendOptions, Group({...})]``: which fields are options, in which order, and their help. Types
are the dataclass's, defaults those of the verb's own default, so that command line and API cannot differ. A tuple of any length
is an option that may be given again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from dmtd_runtime.errors import RequestError
from dmtd_runtime.machine.hardware import MAX_THREADS


@dataclass(frozen=True, slots=True)
class Group:
    """The fields of a dataclass that are options: name -> what ``option`` makes. ``parsers``: those written as one string."""

    options: Mapping[str, Any]
    parsers: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def only(self, *names: str) -> Group:
        """Some of them."""
        return Group({name: self.options[name] for name in names}, self.parsers)

    def written(self, name: str, hint: Any) -> Any:
        """The type that typer reads a field as."""
        if name in self.parsers:
            return str | None
        return list[get_args(hint)[0]] | None if get_origin(hint) is tuple else hint  # type: ignore[misc]

    def shown(self, name: str, default: Any) -> Any:
        """A default as typer takes it: no empty tuple, and a string of what is written as one."""
        if name in self.parsers and default:
            return ",".join(map(str, default))
        return None if default == () else default

    def value(self, name: str, hint: Any, given: Any) -> Any:
        """What a field holds for what was given."""
        if name in self.parsers:
            return self.parsers[name](given) if given is not None else ()
        if get_origin(hint) is tuple and "" in (given or ()):  # as a path it would be the current directory
            raise RequestError("got an empty text; name a file, or leave the option out", param=name)
        return tuple(given or ()) if get_origin(hint) is tuple else given


def option(text: str, *flags: str, panel: str | None = None, **settings: Any) -> Any:
    """One option of a group. ``flags``: how it is written, where that is not the field's name."""
    if "min" in settings:
        settings = {"metavar": "N", **settings}  # typer's own word for a range leaves no room in 80 columns
    return typer.Option(*flags, help=text, rich_help_panel=panel, **settings)


def threads_option(panel: str, default: str = "one for each core this process may use") -> Any:
    """``--threads``, which every verb that computes has."""
    return option(f"CPU threads. By default {default}.", panel=panel, min=1, max=MAX_THREADS)


def takes_groups(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb as typer wants it: each of its groups replaced by the group's options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, Group, dict[str, Any]]] = {}
    for each in inspect.signature(verb, eval_str=True).parameters.values():
        group = next((part for part in getattr(each.annotation, "__metadata__", ()) if isinstance(part, Group)), None)
        if group is None:
            parameters.append(each.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(get_args(each.annotation)[0])
        groups[each.name] = (each.default, group, hints)
        parameters += [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=group.shown(name, getattr(each.default, name)),
                annotation=Annotated[group.written(name, hints[name]), made],
            )
            for name, made in group.options.items()
        ]

    @functools.wraps(verb)
    def flat(**given: Any) -> Any:
        for name, (default, group, hints) in groups.items():
            fields = {each: group.value(each, hints[each], given.pop(each)) for each in group.options}
            given[name] = replace(default, **fields)
        return verb(**given)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat
