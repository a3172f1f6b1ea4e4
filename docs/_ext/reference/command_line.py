"""Every command of ``gpupool``, from its parser."""

from __future__ import annotations

import argparse

from traitlets.utils.importstring import import_item

from jupyter_gpupool.cli.app import COMMANDS

from .text import code, prose, table


def markdown() -> str:
    overview = [
        (f"[`gpupool {word}`](#gpupool-{word.replace(' ', '-')})", help)
        for word, (_, help) in COMMANDS.items()
    ]
    return "\n\n".join([table(["command", "what it does"], overview), *map(command, COMMANDS)])


def command(word: str) -> str:
    app = import_item(COMMANDS[word][0])()
    parser: argparse.ArgumentParser = app.parser()
    parts = [
        f"## gpupool {word}",
        code(parser.format_usage().removeprefix("usage: ")),
        prose(app.description),
    ]
    # argparse has no public name for the groups that its own help is made from.
    for group in parser._action_groups:
        rows = [(_names(action), _help(action)) for action in group._group_actions]
        if rows:
            parts.append(table([group.title or "options", ""], rows))
    if app.examples:
        parts.append(code(str(app.examples)))
    return "\n\n".join(parts)


def _names(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(
        f"`{name} {value}`" if action.nargs != 0 else f"`{name}`" for name in action.option_strings
    )


def _help(action: argparse.Action) -> str:
    given = {**vars(action), "prog": "gpupool"}
    return prose((action.help or "") % given)
