"""Words of messages."""


def counted(count: int, singular: str) -> str:
    """Return a count with its noun.

    Examples
    --------
    >>> counted(1, "recording"), counted(12000, "file")
    ('1 recording', '12,000 files')
    """
    return f"{count:,} {singular}{'' if count == 1 else 's'}"
