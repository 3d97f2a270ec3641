"""Choosing, by measurement, how each product is computed: candidates, their selection, and where choices are kept."""
