"""Callbacks: one method, one file."""
