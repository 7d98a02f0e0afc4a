"""Remedies in PyTorch's errors about the keys of a state dict."""


class KeyWithRemedy(str):
    """A missing or unexpected key that `load_state_dict` shows with a remedy, if it raises an error.

    A module cannot raise the error itself, because only `load_state_dict` knows whether it is strict. The key
    equals the plain key; only its formatted text differs.
    """

    remedy: str

    def __format__(self, spec: str) -> str:
        return self + ": " + self.remedy


def add_remedy(keys: list[str], key: str, remedy: str) -> None:
    """Replace a key in a list of missing or unexpected keys."""
    if key in keys:
        with_remedy = KeyWithRemedy(key)
        with_remedy.remedy = remedy
        keys[keys.index(key)] = with_remedy
