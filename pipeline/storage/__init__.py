"""Files of a trial: atomic writes, and the cells with their checksums."""
