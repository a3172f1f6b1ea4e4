"""Workers on every GPU server of a Ray cluster. Ray is needed where this is used, and imported only then."""
