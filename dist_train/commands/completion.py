"""`completion`: complete commands, options, config files, keys and runs in bash, zsh and fish.

The shells call `dist-train completion --words ...` for each TAB, so that what they offer is always what this version takes:
hence nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_train.commands.usage import COMMANDS, Usage

SCRIPTS = {
    "bash": """\
_dist_train() {
    local line=${COMP_LINE:0:COMP_POINT} text words cut
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    cut=${words[-1]} cut=${cut%"${cut##*[=:]}"}
    [[ $COMP_WORDBREAKS == *=* ]] || cut=
    COMPREPLY=()
    while IFS=$'\\t' read -r text _; do
        [[ $text == *[=./] ]] && compopt -o nospace
        printf -v text %q "$text"
        COMPREPLY+=("${text#"$cut"}")
    done < <("${words[0]}" completion --words "${words[@]:1}" 2>/dev/null)
}
complete -F _dist_train dist-train
""",
    "zsh": """\
#compdef dist-train
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_dist_train() {
    local -a closed open closed_about open_about
    local text about
    while IFS=$'\\t' read -r text about; do
        if [[ $text == *[=./] ]]; then
            open+=("$text") open_about+=("$text${about:+  -- $about}")
        else
            closed+=("$text") closed_about+=("$text${about:+  -- $about}")
        fi
    done < <("${words[1]}" completion --words "${(@)words[2,CURRENT-1]}" "$PREFIX" 2>/dev/null)
    compadd -l -d closed_about -a closed
    compadd -l -S '' -d open_about -a open
}
compdef _dist_train dist-train
""",
    "fish": """\
function __dist_train_complete
    set -l given (commandline -opc)
    $given[1] completion --words $given[2..-1] (commandline -ct) 2>/dev/null
end
complete -c dist-train -f -a '(__dist_train_complete)'
""",
}
USAGE = Usage(
    "completion",
    "A script that completes commands, options, config files, keys of a config (trainer.dur<TAB>), runs and their checkpoints.",
    """\
eval "$(dist-train completion bash)"        # in ~/.bashrc
eval "$(dist-train completion zsh)"         # in ~/.zshrc
dist-train completion fish > ~/.config/fish/completions/dist-train.fish""",
    (("shell", {"metavar": "SHELL", "choices": tuple(SCRIPTS), "help": "bash, zsh or fish"}),),
)
FACTS = ("run", "state", "step", "epoch", "best", "samples/s", "age", "attempts", "reason")
Found = Iterator[tuple[str, str]]  # texts to complete with, each with what it is; after `=`, `.` and `/` more follows


def main(arguments: Sequence[str]) -> int:
    """Print a shell's script, or what its words may be completed with."""
    if arguments[:1] == ["--words"]:
        with contextlib.suppress(Exception):  # a traceback would stand in the middle of what somebody types
            for text, about in dict(complete(arguments[1:])).items():
                print(f"{text}\t{about}" if about else text)
        return 0
    from dist_train.commands.arguments import parse

    print(SCRIPTS[parse(USAGE, arguments).shell], end="")
    return 0


def complete(words: Sequence[str]) -> Found:
    """What the last of these words, which follow `dist-train`, may be completed with."""
    *before, word = words or [""]
    if not before:
        yield from _starting(word, {**COMMANDS, "help": "the help of a command", "--help": "", "--version": ""})
    first = before[0] if before else ""
    if first == "help":
        yield from _starting(word, COMMANDS)
        return
    name = first if first in COMMANDS else "train"
    usage: Usage = importlib.import_module(f"dist_train.commands.{name}").USAGE
    options = {option: settings for option, settings in usage.table() if option[0] == "-"}
    last = options.get(before[-1]) if before else None
    given = [one for one in before if one != first or one not in COMMANDS]
    if last is not None and "action" not in last | ({"action": ""} if before[-1] == "--run" else {}):
        yield from _values(before[-1], last, word, given)
    elif word.startswith("-"):
        yield from _starting(
            word, {option: settings.get("help", "") for option, settings in options.items()} | {"--help": ""}
        )
    else:
        yield from _places(usage, word, given)


def _starting(word: str, known: dict[str, str]) -> Found:
    return ((text, about) for text, about in known.items() if text.startswith(word))


def _places(usage: Usage, word: str, given: list[str]) -> Found:
    """What isn't an option: configs and keys, runs, directories."""
    config = next((one for one in given if one.endswith((".yaml", ".yml"))), None)
    if usage.takes in ("config", "keys"):
        yield from _keys(word, config or str(Path(__file__).parents[1] / "config" / "default.yaml"))
        if usage.takes == "config" and config is None and "=" not in word:
            yield from _files(word, (".yaml", ".yml"))
    elif usage.takes:
        run = next((one for one in given if os.path.isfile(f"{one}/config.yaml")), None)
        if run is None or usage.takes.startswith("runs"):
            yield from _runs(word)
        if run is not None and usage.takes.endswith("keys"):
            yield from _keys(word, f"{run}/config.yaml")
    elif usage.name == "compare":
        yield from _runs(word)
    elif usage.name == "completion":
        yield from _starting(word, dict.fromkeys(SCRIPTS, ""))
    else:
        yield from ((path, about) for path, about in _files(word, ()))


def _values(option: str, settings: dict[str, Any], word: str, given: list[str]) -> Found:
    """The values of an option."""
    run = next((one for one in given if os.path.isdir(f"{one}/checkpoints")), None)
    if "choices" in settings:
        yield from _starting(word, dict.fromkeys(settings["choices"], ""))
    elif option == "--checkpoint":
        steps = sorted(path.name for path in Path(run, "checkpoints").glob("step-*")) if run is not None else []
        yield from _starting(word, dict.fromkeys(["best", "last", *steps], ""))
    elif option == "--run":
        yield from _runs(word)
    elif option == "--get":
        yield from ((text.rstrip("="), about) for text, about in _keys(word, next(iter(given), "")))
    elif option in ("--sort", "--columns", "--where"):
        done, comma, rest = word.rpartition(",") if option == "--columns" else ("", "", word)
        yield from ((f"{done}{comma}{text}", about) for text, about in _starting(rest, dict.fromkeys(FACTS, "")))
    elif option == "--config":
        yield from _files(word, (".yaml", ".yml"))
    elif "FILE" in settings.get("metavar", ""):
        yield from _files(word, ("",))


def _files(word: str, endings: tuple[str, ...]) -> Found:
    """Files with these endings, and directories."""
    folder, part = os.path.split(word)
    with contextlib.suppress(OSError), os.scandir(os.path.expanduser(folder) or ".") as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            if entry.name.startswith(part) and (part or entry.name[0] != "."):
                path = os.path.join(folder, entry.name)
                if entry.is_dir():
                    yield path + "/", ""
                elif entry.name.endswith(endings):
                    yield path, ""


def _runs(word: str) -> Found:
    """Directories, those of runs without a slash behind them; at first the runs in `runs`."""
    for path, _ in _files(word, ()):
        yield (path[:-1], "a run") if os.path.isdir(f"{path}checkpoints") else (path, "")
        if not word and path == "runs/":
            yield from _runs(path)


def _keys(word: str, config: str) -> Found:
    """The next part of a dotted key, or the values of one that has few."""
    schema = json.loads((Path(__file__).parents[1] / "config" / "schema.json").read_text(encoding="utf-8"))
    fields = dict(_fields(schema, schema["properties"], ""))
    with contextlib.suppress(Exception):  # a config that is being written
        import yaml

        fields = {key: {} for key in _dotted(yaml.safe_load(Path(config).read_text(encoding="utf-8")), "")} | fields
    key, equals, value = word.partition("=")
    if equals:
        kinds = [fields.get(key, {}), *fields.get(key, {}).get("anyOf", ())]
        values = [
            one for kind in kinds for one in (*kind.get("enum", ()), *([kind["const"]] if "const" in kind else ()))
        ]
        values += [False, True] * any(kind.get("type") == "boolean" for kind in kinds)
        values += [None] * any(kind.get("type") == "null" for kind in kinds)
        texts = [one if isinstance(one, str) else json.dumps(one) for one in values]
        yield from ((f"{key}={text}", "") for text in texts if text.startswith(value))
        return
    for name, field in fields.items():
        if name.startswith(word):
            dot = name.find(".", len(word))
            about = str(field.get("description", "")).partition(". ")[0].rstrip(".")
            yield (name[: dot + 1], "") if dot >= 0 else (f"{name}=", " ".join(about.split()))


def _fields(schema: dict[str, Any], properties: dict[str, Any], above: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The dotted keys of the sections of a schema."""
    for name, field in properties.items():
        known = [field, *field.get("anyOf", ())]
        inner = [schema["$defs"].get(one["$ref"].rpartition("/")[2], {}) for one in known if "$ref" in one]
        sections = [one for one in inner if one.get("additionalProperties") is False and "properties" in one]
        if not sections:
            yield f"{above}{name}", field
        for section in sections:
            yield from _fields(schema, section["properties"], f"{above}{name}.")


def _dotted(value: Any, above: str) -> Iterator[str]:
    for name, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict) and inner:
            yield from _dotted(inner, f"{above}{name}.")
        else:
            yield f"{above}{name}"
