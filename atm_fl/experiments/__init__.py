"""Studies: the loop run many times, with tables at the end."""
