"""Monitors: callbacks that watch the masks and change nothing."""
