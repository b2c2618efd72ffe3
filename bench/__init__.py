"""Races of every operation against its peers and its ceiling: ``python -m bench``."""
