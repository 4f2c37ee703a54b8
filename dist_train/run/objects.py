"""Whether the live objects of a config (a notebook's, say) are those that a run was started with.

A file can hold only the class of a Python object. So attempts.jsonl holds digests: of its representation, settings and
parameters' shapes, of a dataset's length and some of its samples, and of the code of classes that are in no package.
A config without live objects needs neither torch nor numpy for that: they are imported where they are used.
"""

from __future__ import annotations

import functools
import re
import sys
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dist_train.config.fields import live_objects

if TYPE_CHECKING:
    from dist_train.config.schema import Config

Facts = dict[str, Any]  # what is known of an object, by the words for it
_SEEN: weakref.WeakKeyDictionary[Any, Facts] = weakref.WeakKeyDictionary()
_CODE = f"code (Python {sys.version_info.major}.{sys.version_info.minor})"  # another Python compiles to other bytecode
_SIMPLE = (bool, int, float, str)


def facts_of(config: Config) -> dict[str, Facts]:
    """Of every live object of a config, by its key; as it was when first seen, since training changes objects."""
    found = {}
    for key, value in live_objects(config):
        try:
            facts = _facts(key, value)
        except Exception:  # the user's own code, __len__ say: whatever is wrong with it shows where it is used
            facts = {"representation": type(value).__qualname__}
        try:
            found[key] = _SEEN.setdefault(value, facts)
        except TypeError:  # neither hashable nor weakly referable
            found[key] = facts
    return found


def was_seen(value: object) -> bool:
    """Whether an earlier start of this process has had this object."""
    try:
        return value in _SEEN
    except TypeError:  # neither hashable nor weakly referable
        return False


def sample_digests(config: Config) -> dict[str, str]:
    """Of every live dataset, by its key: a digest of samples 0, the middle and the last, as evaluation reads them.

    Those that differ from one reading to the next, or can't be read, are left out.
    """

    def read(dataset: Any) -> str:
        from dist_train.data.digest import content_digest
        from dist_train.runtime.seeding import seed_sample

        samples, count = [], len(dataset)
        for index in dict.fromkeys((0, count // 2, count - 1)) if count else ():
            seed_sample(config.seed, -1, index)
            samples.append(dataset[index])
        return content_digest(samples)

    found = {}
    for key, value in live_objects(config):
        if key.startswith("data.") and hasattr(value, "__getitem__") and hasattr(value, "__len__"):
            from dist_train.runtime.seeding import undisturbed_generators

            try:
                with undisturbed_generators():
                    first, second = read(value), read(value)
            except Exception:  # the user's own code: whatever is wrong with it shows where it is trained on
                continue
            if first == second:
                found[key] = first
    return found


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """Lines that name what differs between two of the dicts above; what only one of them has isn't compared."""
    lines = []
    for key in [key for key in new if isinstance(old, dict) and type(old.get(key)) is type(new[key])]:
        before, now = old[key], new[key]
        if isinstance(now, dict):
            words = [word for word in now if word in before and now[word] != before[word]]
            named = [f"{word} {before[word]} -> {now[word]}" if word == "length" else word for word in words]
            lines += [f"{key}: another {', '.join(named)}"] if named else []
        elif before != now:
            lines.append(f"{key}: other samples")
    return lines


def _facts(key: str, value: Any) -> Facts:
    from torch import nn

    from dist_train.data.digest import content_digest

    facts: Facts = {"representation": content_digest(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)))}
    if key.startswith("data.") and hasattr(value, "__len__"):
        facts["length"] = len(value)
    if isinstance(value, nn.Module):
        parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in value.named_parameters()]
        facts["parameters"] = content_digest(parameters)
        facts["buffers"] = content_digest([] if key == "model" else list(value.named_buffers()))  # class weights, say
    if not key.startswith(("data.t", "data.val", "callbacks")):  # those may count what they do
        facts["settings"] = content_digest([_settings(part) for part in _parts(value)])
    if code := sorted({repr(piece) for part in _parts(value) for piece in _code(part)}):
        facts[_CODE] = content_digest(code)
    return facts


def _parts(value: Any) -> Iterator[Any]:
    """The object, and those inside it that count as well."""
    from torch import nn

    if isinstance(value, functools.partial):
        yield from (part for inner in (value.func, *value.args, *value.keywords.values()) for part in _parts(inner))
    elif isinstance(value, nn.Module):
        yield from value.modules()
    elif value is not None:
        yield value
        yield from _parts(getattr(value, "dataset", None))


def _settings(part: Any) -> list[Any]:
    held = getattr(part, "__dict__", {})
    settings: list[Any] = [
        (name, held[name]) for name in sorted(held.keys() - {"training"}) if type(held[name]) in _SIMPLE
    ]
    if isinstance(part, types.FunctionType):
        values = (*(cell.cell_contents for cell in part.__closure__ or ()), *(part.__defaults__ or ()))
        settings += [item for item in values if type(item) in _SIMPLE]
    return settings


def _code(value: Any) -> Iterator[Any]:
    """The code of a function, or of the methods of an object's classes, where they aren't part of a package."""
    functions = [value] if isinstance(value, types.FunctionType) else []
    for kind in (value if isinstance(value, type) else type(value)).__mro__:
        if _is_users(kind):
            held = [getattr(item, "fget", None) or getattr(item, "__func__", item) for item in vars(kind).values()]
            functions += [item for item in held if isinstance(item, types.FunctionType)]
            yield from ((name, item) for name, item in vars(kind).items() if type(item) in _SIMPLE)
    yield from (_compiled(function.__code__) for function in functions if _is_users(function))


def _is_users(thing: Any) -> bool:
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    name, file = str(getattr(module, "__name__", "")), str(getattr(module, "__file__", None) or "")
    standard = name.partition(".")[0] in sys.stdlib_module_names - {"__main__"}
    return not standard and "-packages" not in file and not name.startswith("dist_train.")


def _compiled(code: types.CodeType) -> Any:
    """What a function does, without its position in the source."""
    constants = [_compiled(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    return code.co_name, code.co_code.hex(), code.co_names, constants


def _constant(item: Any) -> str:
    return repr(sorted(map(repr, item)) if isinstance(item, frozenset) else item)
