"""From the cells of a trial to its verdict."""
