"""Workers on every GPU server of a Ray cluster. Ray is imported only when this engine is used."""
