"""Files written whole, and the cells of a trial folder."""
