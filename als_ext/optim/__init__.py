"""Optimizers: ALSO, adaptive loss scaling with the optimistic or the descent-ascent step."""

from als_ext.optim.also import ALSO as ALSO
