"""Keys of DINO heads in checkpoints: finding the heads, and mapping their keys to ours."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

# Names that data parallelism, torch.compile, FSDP and activation checkpointing insert into keys.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Names of the last layer's tensors: ours -> theirs.
OLD_WEIGHT_NORM = {"weight_g": "weight_g", "weight_v": "weight_v"}
PARAMETRIZATION = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
PLAIN = {"weight": "weight"}


class Layout(NamedTuple):
    """The name of the MLP, and the names of the last layer's tensors."""

    mlp: str
    last_layer: Mapping[str, str]


LAYOUTS = {
    "dino": Layout("mlp", OLD_WEIGHT_NORM),
    "dinov3": Layout("mlp", PLAIN),
    "lightly": Layout("layers", OLD_WEIGHT_NORM),
    "lightly-train": Layout("mlp", PARAMETRIZATION),
}
OURS = {name: ours for names in (OLD_WEIGHT_NORM, PARAMETRIZATION, PLAIN) for ours, name in names.items()}
# The authors' MLP of one layer is a Linear, not a Sequential: mlp.weight.
IN_MLP = re.compile(
    r"(?:(.*)\.)??(?:(?:mlp|layers)\.(\d+)|mlp)\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
IN_LAST_LAYER = re.compile(rf"(?:(.*)\.)??last_layer\.({'|'.join(map(re.escape, OURS))})")


@dataclass
class FoundHead:
    """A head in a checkpoint."""

    path: str  # without wrappers; "" if the checkpoint is the head
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by our keys
    names: dict[str, str] = field(default_factory=dict)  # our keys -> the checkpoint's
    unexplained: list[str] = field(default_factory=list)  # unknown keys of the checkpoint below the path
    roots: set[str] = field(default_factory=set)  # the path with wrappers; several if two heads share the path


def without_wrappers(key: str) -> str:
    """`module.head._orig_mod.mlp.0.weight` -> `head.mlp.0.weight`."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def parse(key: str) -> tuple[str, str] | None:
    """The path and our key of a key that names a part of a head: `a.mlp.0.bias` -> `a`, `layers.0.bias`."""
    if match := IN_MLP.fullmatch(key):
        return match[1] or "", f"layers.{match[2] or 0}.{match[3]}"
    if match := IN_LAST_LAYER.fullmatch(key):
        return match[1] or "", f"last_layer.{OURS[match[2]]}"
    return None


def find_heads(tensors: Mapping[str, Tensor], others: Iterable[str] = ()) -> dict[str, FoundHead]:
    """Find all heads, by their paths. A head is an MLP and a last layer with the same parent.

    Args:
        tensors: Tensors of a checkpoint.
        others: Keys of the checkpoint whose values are not tensors.

    Raises:
        ValueError: There is no head.
    """
    keys = {name: without_wrappers(name) for name in tensors}
    parts: dict[str, set[str]] = {}
    for path, ours in filter(None, map(parse, keys.values())):
        parts.setdefault(path, set()).add(ours.split(".")[0])
    heads = {path: FoundHead(path) for path, found in parts.items() if len(found) == 2}
    if not heads:
        hint = ""
        if any(key.endswith("_flat_param") for key in tensors):
            hint = ". These are flat shards of FSDP: save a full state dict, or use the file of the run's evaluation"
        raise ValueError(
            "there is no DINO head (mlp.* or layers.* beside last_layer.*) among "
            f"{listed(grouped(tensors)) or 'no tensors'}: this may be only the backbone; use the checkpoint of the "
            f"training{hint}"
        )
    for name, key in keys.items():
        for path, head in heads.items():
            if path and not key.startswith(f"{path}."):
                continue
            of, ours = parse(key) or (None, "")
            if of == path:
                head.roots.add(_root(name, path))
            if of == path and ours not in head.tensors:
                head.tensors[ours], head.names[ours] = tensors[name], name
            else:
                head.unexplained.append(name)
    for name in others:
        names = without_wrappers(name).split(".")
        for index, part in enumerate(names):
            path = ".".join(names[:index])
            if part in ("mlp", "layers", "last_layer") and path in heads:
                heads[path].unexplained.append(name)
    return heads


def _root(name: str, path: str) -> str:
    """The path with the wrappers of a key: `module.head.mlp.0.bias` and `head` -> `module.head`."""
    parts = name.split(".")
    return next(root for end in range(len(parts)) if without_wrappers(root := ".".join(parts[:end])) == path)


def select(heads: Mapping[str, FoundHead], part: str) -> FoundHead:
    """The one head that `part` matches; see `load_head`."""
    teachers = [path for path in heads if re.search(r"teacher|momentum|(^|[._])ema([._]|$)", path.lower())]
    students = [path for path in heads if "student" in path.lower() and path not in teachers]
    neutral = [path for path in heads if path not in teachers and path not in students]
    choices = [
        [path for path in heads if path == part],
        [path for path in heads if f".{part}." in f".{path}."],
    ]
    if part in ("teacher", "student"):
        choices.append(teachers if part == "teacher" else students)
        # A head without "teacher" or "student" in its path is the student if there is a teacher; if it is the only
        # head, it matches both.
        choices.append(neutral if (part == "student" and not students) or len(heads) == 1 else [])
    else:
        choices.append([path for path in heads if part in re.split(r"[._]", path)])
    chosen = next((paths for paths in choices if paths), [])
    if len(chosen) == 1:
        return heads[chosen[0]]
    there = ", ".join(map(repr, chosen or heads))
    if not chosen:
        raise ValueError(f"no head matches part={part!r}, found {there}: pass one of these as part")
    raise ValueError(f"{len(chosen)} heads match part={part!r}: {there}: pass one of these as part")


def grouped(names: Iterable[str], paths: Collection[str] = ()) -> list[str]:
    """Group keys by their first part that differs from the path of a head, with the size of each group."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = without_wrappers(name).split(".")
        shared = max((_shared(parts, path.split(".")) for path in paths), default=1)
        rest = ".*" if len(parts) > shared + 1 else ""
        counts[".".join(parts[: shared + 1]) + rest] += 1
    return [f"{group} ({count} tensors)" if count > 1 else group for group, count in counts.items()]


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Number of equal leading parts."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def listed(items: Sequence[str], most: int = 8) -> str:
    """The first items, separated by commas, and the number of the remaining ones."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
