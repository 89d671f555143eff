"""Text as people are shown it: what a file or a library says may hold anything, escape codes and whole files too."""

from __future__ import annotations

import re

LONGEST = 1000

# Control characters; marks that turn the direction of what follows; line separators; halves of characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# An option as a shell names it, which begins a word; what follows tells whether it stands for its name or for being on.
_OPTION = re.compile(r"(?<![^\s(])--([a-z][a-z0-9-]*)(?P<name_only>(?= (?:is|must) ))?")
# Those that a shell gives without a value. A test holds them against the configs, which are not to be imported here.
SWITCHES = frozenset({"asvd_search", "bf16", "new_head", "offload", "overwrite", "resume", "may_skip", "state_dict"})
_UNSEEN_BUT_LINES = re.compile(_UNSEEN.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def shown(text: str, longest: int = LONGEST) -> str:
    """Text on one line of at most `longest` characters; what a terminal would obey instead of show is escaped.

    A text that is too long loses its middle: its beginning says what it is about, its end what to do.
    """
    # Four times as much is enough to fill the line, and a whole file is not gone through.
    lines = (line.strip() for line in _cut(text, 4 * longest).splitlines())
    return _cut(_UNSEEN.sub(_escaped, " ".join(line for line in lines if line)), longest)


def printable(text: str) -> str:
    """Text of several lines with all else escaped that a terminal would obey instead of show."""
    return _UNSEEN_BUT_LINES.sub(_escaped, text)


def in_python(text: str) -> str:
    """A message that names options as a shell does, with the names of arguments: `overwrite=True` for `--overwrite`."""
    return _OPTION.sub(_argument, text)


def _argument(match: re.Match[str]) -> str:
    name = match[1].replace("-", "_")
    return f"{name}=True" if name in SWITCHES and match["name_only"] is None else name


def on_one_line(text: str) -> str:
    """Text of any length, such as a file's name, with all escaped that would end its line or be obeyed."""
    return _UNSEEN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _cut(text: str, longest: int) -> str:
    """Text without its middle where it is longer."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
