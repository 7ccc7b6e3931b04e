"""Command-line flags out of the one table in `settings.OPTIONS`, and the help that shows them with their variables.

Which groups of the table a verb takes is decided where the verb is defined; the three locations, the runtime directory and
`--log-level` are given to every verb, whether it needs them all or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from valohai_fuse.settings import OPTIONS, Group, Option, Settings, is_in_environment, resolve

TITLES: dict[Group, str] = {
    "location": "Locations",
    "mount": "Mount",
    "reading": "Reading",
    "cache": "Cache",
    "network": "Network",
    "log": "Log",
}
"""The groups of the table, in the order of the help."""
ALL_GROUPS: tuple[Group, ...] = tuple(TITLES)

_effective: list[Settings] = []
"""What the command at hand resolved to, for the last edge (`main`), which says where the logs are. One command a process."""


class TableOption(click.Option):
    """A flag that stands in the table."""

    def __init__(self, option: Option) -> None:
        self.group = option.group
        flag = f"{option.flag}/--no-{option.flag[2:]}" if option.is_switch else option.flag
        notes = [f"env {option.env}"]
        if option.default is not None:
            notes.append(f"default {'off' if option.is_switch and option.default == '0' else option.default}")
        super().__init__(
            [flag, option.name],
            default=None,
            type=bool if option.is_switch else str,
            metavar=None if option.is_switch else option.metavar,
            help=f"{option.help}  [{'; '.join(notes)}]",
        )


class Verb(click.Command):
    """A command whose help has an example and its flags by group."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verb's own flags first, then those of the table."""
        formatter.write_paragraph()
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write_text(line)
        own = [p for p in self.get_params(ctx) if isinstance(p, click.Option) and not isinstance(p, TableOption)]
        records = [record for p in own if (record := p.get_help_record(ctx)) is not None]
        if records:
            with formatter.section("Options"):
                formatter.write_dl(records)
        for group, title in TITLES.items():
            of_table = [p for p in self.params if isinstance(p, TableOption) and p.group == group]
            records = [record for p in of_table if (record := p.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def verb(
    name: str, *, example: str, groups: Sequence[Group] = (), **attributes: Any
) -> Callable[[Callable[..., int | None]], Verb]:
    """Makes a command of a function that takes `settings` and the parameters declared with click's own decorators.

    The function's return value is the exit code (None: 0).
    """

    def decorate(function: Callable[..., int | None]) -> Verb:
        def call(**parameters: Any) -> int | None:
            flags = {option.name: parameters.pop(option.name) for option in OPTIONS if option.name in parameters}
            settings = resolve(flags)
            _effective[:] = [settings]
            return function(settings, **parameters)

        body: Callable[..., int | None] = functools.update_wrapper(call, function)
        for option in OPTIONS:  # click turns the whole list round
            if option.group in {"location", *groups} or option.name == "log_level":
                body = _with_parameter(body, TableOption(option))
        made = click.command(name, cls=Verb, example=example, **attributes)(body)
        assert isinstance(made, Verb)
        return made

    return decorate


def _with_parameter(function: Callable[..., int | None], option: click.Option) -> Callable[..., int | None]:
    declared: list[click.Parameter] = getattr(function, "__click_params__", [])
    function.__click_params__ = [option, *declared]  # type: ignore[attr-defined] # how click's own decorators keep them
    return function


def was_given(name: str) -> bool:
    """Whether a flag of the running command or its variable says what the setting `name` is; else it is the default."""
    flag = click.get_current_context().params.get(name)
    return flag is not None or is_in_environment(name)


def effective_settings() -> Settings | None:
    """The settings of the running command; None before they were resolved."""
    return _effective[0] if _effective else None
