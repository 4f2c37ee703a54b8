"""What tells one live object of a config from another: a cell of a notebook that is run again may hold other ones by then.

Of an object from Python a file can hold only its class; so its representation, its parameters' shapes, a dataset's length and
some of its samples, and the code of classes that are no file's are kept as digests.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import types
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dist_train.config.fields import live_objects
from dist_train.runtime.seeding import seed_sample, undisturbed_generators

if TYPE_CHECKING:
    from dist_train.config.schema import Config

Facts = dict[str, Any]  # what is known of an object, by the words for it
_SEEN: weakref.WeakKeyDictionary[Any, Facts] = weakref.WeakKeyDictionary()
_CODE = f"code (Python {sys.version_info.major}.{sys.version_info.minor})"  # another Python compiles to another code


def facts_of(config: Config) -> dict[str, Facts]:
    """Of every live object of a config, by its key. What training changes of an object is as it was when first seen."""
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


def sample_digests(config: Config) -> dict[str, str]:
    """Of every live dataset, by its key: a digest of samples 0, the middle and the last, as evaluation reads them.

    Those that differ from one reading to the next, or can't be read, aren't there.
    """
    found = {}
    for key, value in live_objects(config):
        if key.startswith("data.") and hasattr(value, "__getitem__") and hasattr(value, "__len__"):
            try:
                with undisturbed_generators():
                    first, second = _samples(value, config.seed), _samples(value, config.seed)
            except Exception:  # the user's own code: whatever is wrong with it shows where it is trained on
                continue
            if first == second:
                found[key] = first
    return found


def differences(old: Any, new: dict[str, Any]) -> list[str]:
    """Lines that name what differs, of two of the dicts above; what only one of them has isn't compared."""
    lines = []
    for key in [key for key in new if isinstance(old, dict) and type(old.get(key)) is type(new[key])]:
        before, now = old[key], new[key]
        if isinstance(now, dict):
            words = [word for word in now if word in before and now[word] != before[word]]
            told = [f"{word} {before[word]} -> {now[word]}" if word == "length" else word for word in words]
            lines += [f"{key}: another {', '.join(told)}"] if told else []
        elif before != now:
            lines.append(f"{key}: other samples")
    return lines


def _samples(dataset: Any, seed: int) -> str:
    digest, count = hashlib.sha256(), len(dataset)
    for index in dict.fromkeys((0, count // 2, count - 1)) if count else ():
        seed_sample(seed, -1, index)
        _feed(digest, dataset[index])
    return digest.hexdigest()[:16]


def _facts(key: str, value: Any) -> Facts:
    facts: Facts = {"representation": _short(_text(value))}
    if key.startswith("data.") and hasattr(value, "__len__"):
        facts["length"] = len(value)
    if isinstance(value, nn.Module):
        facts["parameters"] = _short([(name, tuple(p.shape), p.dtype) for name, p in value.named_parameters()])
        digest = hashlib.sha256()
        _feed(digest, [] if key == "model" else list(value.named_buffers()))  # a loss's class weights
        facts["buffers"] = digest.hexdigest()[:16]
    if not key.startswith(("data.t", "data.val", "callbacks")):  # those may count what they do
        facts["settings"] = _short(list(_settings(value)))
    if code := sorted({repr(piece) for part in _parts(value) for piece in _code(part)}):
        facts[_CODE] = _short(code)
    return facts


def _parts(value: Any) -> Iterator[Any]:
    """The object, and those inside it whose code counts as well."""
    if isinstance(value, functools.partial):
        yield from (part for inner in (value.func, *value.args, *value.keywords.values()) for part in _parts(inner))
    elif isinstance(value, nn.Module):
        yield from value.modules()
    elif value is not None:
        yield value
        yield from _parts(getattr(value, "dataset", None))


def _settings(value: Any) -> Iterator[Any]:
    for part in _parts(value):
        held = getattr(part, "__dict__", {})
        names = sorted(held.keys() - {"training"})
        yield [(name, held[name]) for name in names if type(held[name]) in (bool, int, float, str)]
        if isinstance(part, types.FunctionType):
            cells = [cell.cell_contents for cell in part.__closure__ or ()]
            yield [item for item in (*cells, *(part.__defaults__ or ())) if type(item) in (bool, int, float, str)]


def _code(value: Any) -> Iterator[Any]:
    """The code of a function, or of the methods of an object's classes, where they aren't somebody's package."""
    functions = [value] if isinstance(value, types.FunctionType) else []
    for kind in (value if isinstance(value, type) else type(value)).__mro__:
        if _is_own(kind):
            held = [getattr(item, "fget", None) or getattr(item, "__func__", item) for item in vars(kind).values()]
            functions += [item for item in held if isinstance(item, types.FunctionType)]
            yield from ((name, item) for name, item in vars(kind).items() if type(item) in (bool, int, float, str))
    yield from (_compiled(function.__code__) for function in functions if _is_own(function))


def _is_own(thing: Any) -> bool:
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    file = str(getattr(module, "__file__", None) or "")
    standard = module is not None and module.__name__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}
    return (
        not standard and "-packages" not in file and not str(getattr(module, "__name__", "")).startswith("dist_train.")
    )


def _compiled(code: types.CodeType) -> Any:
    constants = [_compiled(item) if isinstance(item, types.CodeType) else _constant(item) for item in code.co_consts]
    return code.co_name, code.co_code.hex(), code.co_names, constants


def _constant(item: Any) -> str:
    return repr(sorted(map(repr, item)) if isinstance(item, frozenset) else item)


def _text(value: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    except Exception:
        return type(value).__qualname__


def _short(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    """Whatever a sample is made of, into a digest."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        _feed(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item)
    elif hasattr(value, "tobytes"):  # an array, a picture
        digest.update(f"{getattr(value, 'shape', getattr(value, 'size', ''))}".encode() + value.tobytes())
    else:
        digest.update(_text(value).encode("utf-8", "backslashreplace"))
