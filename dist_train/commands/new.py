"""`new`: a folder with a model, a dataset, a config and a batch script, ready to train."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.arguments import parse
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
FILES = {name: PACKAGE / "templates" / name for name in ("model.py", "data.py", "config.yaml", "train.sbatch")}
# Beside the config, whose first line names it: editors with yaml-language-server complete and check the keys by it.
FILES["dist_train.schema.json"] = PACKAGE / "config" / "schema.json"

USAGE = Usage(
    "new",
    "A folder with a model, a dataset, a config and a batch script, ready to train.",
    "dist-train new project && cd project && dist-train config.yaml",
    (("dir", {"metavar": "DIR", "help": "the folder, which may exist"}),),
)


def main(arguments: Sequence[str]) -> int:
    """Write the files; existing ones are never overwritten."""
    folder = Path(parse(USAGE, arguments).dir)
    if there := [name for name in FILES if (folder / name).exists()]:
        message = f"{folder} already has {', '.join(there)}; nothing was written: name another folder"
        raise ConfigError.single("DIR", message)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in FILES.items():
            (folder / name).write_bytes(source.read_bytes())
    except OSError as error:
        for name in FILES:  # none of them was there: a disk that is full leaves a part
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        raise ConfigError.single("DIR", f"{folder} can't be written: {error}") from None
    print(f"{folder}: {', '.join(FILES)}; to start:\n  cd {shlex.quote(str(folder))} && dist-train config.yaml")
    return 0
