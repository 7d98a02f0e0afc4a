"""Reports about the heads in a checkpoint: the mapping of each key, and the rest of the file."""

import os
from collections.abc import Collection, Mapping

from torch import Tensor

from dino_head.checkpoints._convert import arguments_for, constructor_call, fit_head
from dino_head.checkpoints._files import Contents, read
from dino_head.checkpoints._layouts import FoundHead, find_heads, grouped


def describe(source: str | os.PathLike[str]) -> tuple[str, bool]:
    """Describe the heads in a checkpoint.

    Args:
        source: File, as for `load_head`.

    Returns:
        The report, and whether `load_head` can load every head.

    Raises:
        ValueError: The file contains no head, or is not a checkpoint.
        OSError: The file cannot be opened.
    """
    contents = read(source)
    heads = find_heads(contents.tensors, contents.others)
    lines = [f"heads: {', '.join(path or 'the whole file' for path in heads)}"]
    is_loadable = True
    for head in heads.values():
        try:
            report = head_lines(head, fit_head(head)[1])
        except ValueError as error:
            report, is_loadable = [f"error: {error}"], False
        lines += ["", *report]
    return "\n".join([*lines, "", *other_lines(contents, heads.values())]), is_loadable


def head_lines(found: FoundHead, state: Mapping[str, Tensor], why: str = "") -> list[str]:
    """The head's arguments, the reason for `norm_last_layer` (by default, the values), and the mapping of each key."""
    arguments = arguments_for(state)
    norm = arguments["norm_last_layer"]
    reasons = {None: "there is no weight norm", True: "each weight_g is 1", False: "a weight_g is not 1"}
    why = why or f"norm_last_layer={norm}: {reasons[norm]}"
    lines = [f"{found.path or 'head'}: {constructor_call(arguments)}", f"  {why}"]
    added = [key for key in state if key not in found.tensors]
    for key, tensor in found.tensors.items():
        becomes = key if key in state else " and ".join(key for key in added if key.startswith("last_layer."))
        converted = "" if key not in state or state[key].dtype == tensor.dtype else f", now {state[key].dtype}"
        lines.append(f"  {found.names[key]} -> {becomes} {tuple(tensor.shape)} {tensor.dtype}{converted}")
    lines.extend(f"  missing: {key}, set to 0" for key in added if not key.startswith("last_layer."))
    return lines


def other_lines(contents: Contents, heads: Collection[FoundHead]) -> list[str]:
    """The tensors of a checkpoint that are not in these heads, in groups, and its entries that are not tensors."""
    used = {name for head in heads for name in [*head.names.values(), *head.unexplained]}
    unused = grouped([name for name in contents.tensors if name not in used], [head.path for head in heads])
    lines = [f"not used: {', '.join(unused)}"] if unused else []
    others = dict.fromkeys(name.split(".")[0] for name in contents.others)
    return [*lines, f"other entries: {', '.join(others)}"] if others else lines
