"""Implementations of the numerics; each module is one, none imports another's."""
