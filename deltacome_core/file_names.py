"""What a file of a checkpoint or delta may be called, wherever it comes from."""

import re

_PLAIN = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")


def is_plain_name(name: str) -> bool:
    """Tell whether a name is safe to join to a folder.

    Args:
        name: as it came.

    Returns:
        True for 1 to 200 letters, digits, dots, dashes and underscores that begin with a letter
        or digit: no folder, no hidden file.
    """
    return bool(_PLAIN.match(name))
