"""Writers of reference pages: each module has ``markdown()``."""
