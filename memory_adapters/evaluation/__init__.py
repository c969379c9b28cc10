"""Measuring what a memory learned and what it left alone."""
