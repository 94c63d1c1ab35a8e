"""`slidevlm completion`: scripts by which a shell completes commands, arguments and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slidevlm.flags import Argument

SHELLS = ("bash", "zsh")
Commands = Mapping[tuple[str, ...], Sequence[Argument]]

_FUNCTION = """\
_slidevlm() {
  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
  local command="${COMP_WORDS[1]}" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -gt 2 ]; then
    case "$command" in
      %(families)s) command="$command ${COMP_WORDS[2]}" ;;
    esac
  fi
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="%(first)s"
  else
    case "$command:$before" in
%(values)s
    esac
  fi
  if [ -z "$words" ]; then
    case "$current" in
      -*)
        case "$command" in
%(flags)s
        esac
        ;;
      *)
        case "$command:$COMP_CWORD" in
%(positional)s
        esac
        ;;
    esac
  fi
  # Without words the shell completes names of files.
  [ -z "$words" ] || COMPREPLY=( $(compgen -W "$words" -- "$current") )
}
complete -o default -F _slidevlm slidevlm
"""
_ZSH = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"


def script(shell: str, commands: Commands) -> str:
    """What `eval "$(slidevlm completion SHELL)"` runs.

    Args:
        shell: one of `SHELLS`.
        commands: the words of each command, and its arguments.
    """
    families = sorted({name[0] for name in commands if len(name) > 1})
    second = {f: " ".join(name[1] for name in commands if name[0] == f) for f in families}
    flags, values, positional = [], [], [_case(f"{f}:2", second[f]) for f in families]
    for name, arguments in commands.items():
        command = " ".join(name)
        given = [a for a in arguments if not a.spec.positional]
        flags.append(_case(command, " ".join(["--help", *(a.flag for a in given)])))
        for a in given:
            if words := _values(a):
                keys = "|".join(f'"{command}:{flag}"' for flag in (a.flag, *a.spec.also))
                values.append(f'      {keys}) words="{words}" ;;')
        for place, a in enumerate((a for a in arguments if a.spec.positional), len(name) + 1):
            if words := _values(a):
                positional.append(_case(f"{command}:{place}", words))
    text = _FUNCTION % {
        "families": "|".join(families),
        "first": " ".join(dict.fromkeys(name[0] for name in commands)),
        "values": "\n".join(values),
        "flags": "\n".join(flags),
        "positional": "\n".join(positional),
    }
    return (_ZSH if shell == "zsh" else "") + text


def _case(key: str, words: str) -> str:
    return f'          "{key}") words="{words}" ;;'


def _values(argument: Argument) -> str:
    """The values that an argument can have, where they are few and known."""
    if argument.spec.shipped:
        folder = Path(__file__).parent / "models" / "zoo"
        return " ".join(sorted(file.stem for file in folder.glob("*.json")))
    return " ".join(argument.spec.choices)
