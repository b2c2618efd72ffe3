"""Comparisons of methods: the grid, its folder of results, figures, tables and plots.

``als-ext compare`` trains the cells; everything that is made of their results is here.
"""
