"""What a benchmark lacks on this machine."""


class Missing(Exception):
    """Something that a benchmark needs is not there; the text says where to get it."""
